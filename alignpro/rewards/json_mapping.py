"""The mapping between samples and the JSON of a server: what is sent, and where in the answer the scores are.

Texts are put into a structure, which is then written as JSON: they are never part of a text that is parsed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.data import Prompt, replace_lone_surrogates
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.component import describe_prompt

EACH = "$each"
"""The key whose value is repeated, once for each sample of a batch."""
METADATA = "metadata"
PLACEHOLDERS = ("prompt", "messages", "response", "rewrite", METADATA)

_INSIDE = re.compile(rf"\$({'|'.join(PLACEHOLDERS)})\b")
_LONGEST_NAME = 40
_MOST_NAMES = 8


@dataclass(frozen=True)
class Sample:
    """What is scored."""

    prompt: Prompt
    """The ORIGINAL prompt."""
    response: str
    rewrite: str | None


class BodyTemplate:
    """The body of a request, with placeholders for the texts of a sample, or of a batch of them.

    A string that begins with ``$`` is a placeholder: ``$prompt`` (the user's last turn), ``$messages`` (all turns, each with
    role and content), ``$response``, ``$rewrite`` (null without any), ``$metadata`` and ``$metadata.NAME``; ``$$`` stands for
    ``$`` itself. In a batch a placeholder is the list of all samples' values, and ``{$each: …}`` the list of its content, filled
    for each of them.

    Args:
        body: The template, as the configuration gives it.
        batched: Whether a request is for a batch.
        what: The component's name in messages.

    Raises:
        ConfigError: A placeholder is unknown or stands within other text, ``$each`` stands at a wrong place, or ``$response``
            does not occur.
    """

    def __init__(self, body: Any, *, batched: bool, what: str) -> None:
        self._body = body
        self._batched = batched
        self._what = what
        used = {name for text in self._strings(body, batched) if (name := self._placeholder(text)) is not None}
        if "response" not in used:
            raise ConfigError(f"{what}: body never uses $response, which is to be scored")
        self.columns = sorted(name.removeprefix(f"{METADATA}.") for name in used if name.startswith(f"{METADATA}."))
        """The columns of the data that it takes."""

    def fill(self, samples: Sequence[Sample]) -> Any:
        """The body of a request for one sample, or for a batch.

        Raises:
            RewardError: A prompt's metadata cannot be written as JSON.
        """
        return self._fill(self._body, samples if self._batched else samples[0])

    def _fill(self, part: Any, samples: Sample | Sequence[Sample]) -> Any:
        if isinstance(part, Mapping):
            if EACH in part and not isinstance(samples, Sample):
                return [self._fill(part[EACH], sample) for sample in samples]
            return {key: self._fill(value, samples) for key, value in part.items()}
        if isinstance(part, list):
            return [self._fill(value, samples) for value in part]
        name = self._placeholder(part) if isinstance(part, str) else None
        if name is None:
            return part.removeprefix("$") if isinstance(part, str) else part
        if isinstance(samples, Sample):
            return self._value(name, samples)
        return [self._value(name, sample) for sample in samples]

    def _value(self, name: str, sample: Sample) -> Any:
        prompt = sample.prompt
        match name:
            case "prompt":
                return replace_lone_surrogates(prompt.text)
            case "messages":
                return [
                    {"role": each.role, "content": replace_lone_surrogates(each.content)} for each in prompt.messages
                ]
            case "response":
                return replace_lone_surrogates(sample.response)
            case "rewrite":
                return None if sample.rewrite is None else replace_lone_surrogates(sample.rewrite)
        value = dict(prompt.metadata) if name == METADATA else prompt.metadata.get(name.removeprefix(f"{METADATA}."))
        try:
            return json.loads(replace_lone_surrogates(json.dumps(value, ensure_ascii=False, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"{self._what}: ${name} cannot be written as JSON: {error}\n  for {describe_prompt(prompt)}"
            ) from error

    def _placeholder(self, text: str) -> str | None:
        """The name of the placeholder that a string is; None if it is none."""
        if not text.startswith("$") or text.startswith("$$"):
            return None
        return text.removeprefix("$")

    def _strings(self, part: Any, batched: bool) -> Iterator[str]:
        """All strings of the template that are values, checked."""
        if isinstance(part, Mapping):
            if EACH in part and (not batched or len(part) > 1):
                problem = "stands beside other keys" if batched else "needs batch_size, and cannot be within another"
                raise ConfigError(f"{self._what}: body: {EACH} {problem}")
            for key, value in part.items():
                yield from self._strings(value, batched and key != EACH)
        elif isinstance(part, list):
            for value in part:
                yield from self._strings(value, batched)
        elif isinstance(part, str):
            self._check(part)
            yield part

    def _check(self, text: str) -> None:
        name = self._placeholder(text)
        if name in PLACEHOLDERS or (name or "").startswith(f"{METADATA}.") or text.startswith("$$"):
            return
        if name is not None:
            close = difflib.get_close_matches(name, PLACEHOLDERS, n=1)
            raise ConfigError(
                f"{self._what}: body: unknown placeholder {text!r}"
                + (f" (did you mean '${close[0]}'?)" if close else "")
                + f"; there are {', '.join(f'${each}' for each in PLACEHOLDERS)}, ${METADATA}.NAME, and $$ for a $"
            )
        if _INSIDE.search(text):
            raise ConfigError(
                f"{self._what}: body: {text!r} has a placeholder within other text: it must stand alone, and the server put "
                "texts together"
            )


class ScorePath:
    """Where in an answer the scores are: names and indices, separated by dots; ``*`` stands for all elements of a list.

    Args:
        path: The path; an empty one is the answer itself.
        batched: Whether an answer holds the scores of a batch, as a list.
        abstains: Whether a score that is null or no finite number is None, and not an error.
    """

    def __init__(self, path: str, *, batched: bool, abstains: bool = False) -> None:
        self._abstains = abstains
        self._parts = path.split(".") if path else []
        self._batched = batched

    def read(self, answer: Any, samples: Sequence[Sample], what: str) -> list[float | None]:
        """The scores of a batch, or of one sample.

        Args:
            answer: The server's answer, parsed.
            samples: What was asked about, in order.
            what: The component and the server, in messages.

        Raises:
            RewardError: They are not there, not one for each sample, or not finite numbers; the message names the prompt.
        """
        about = f"\n  for {'a batch that begins with ' if self._batched else ''}{describe_prompt(samples[0].prompt)}"
        try:
            found = _find(answer, self._parts, [])
        except LookupError as error:
            raise RewardError(f"{what}: {error.args[0]}{about}") from None
        if not self._batched:
            return [self._score(found, samples[0], what)]
        if not isinstance(found, list) or len(found) != len(samples):
            got = f"{len(found)} scores" if isinstance(found, list) else f"{_kind(found)}, not a list of scores"
            raise RewardError(f"{what}: the answer to {len(samples)} samples holds {got}{about}")
        return [self._score(value, sample, what) for value, sample in zip(found, samples, strict=True)]

    def _score(self, value: Any, sample: Sample, what: str) -> float | None:
        try:
            return _number(value, sample, what)
        except RewardError:
            if self._abstains:
                return None
            raise


def _find(value: Any, parts: Sequence[str], walked: Sequence[str]) -> Any:
    if not parts:
        return value
    part, *rest = parts
    if part == "*" and isinstance(value, list):
        return [_find(each, rest, [*walked, str(i)]) for i, each in enumerate(value)]
    if isinstance(value, dict) and part in value:
        return _find(value[part], rest, [*walked, part])
    if isinstance(value, list) and part.isdecimal() and part.isascii() and len(part) < 10 and int(part) < len(value):
        return _find(value[int(part)], rest, [*walked, part])
    where = f"at {'.'.join(walked)!r}" if walked else "at its top"
    raise LookupError(f"the answer has no {part!r} {where}, where it has {_describe(value)}: see `score`")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        names = [repr(name[:_LONGEST_NAME]) for name in list(value)[:_MOST_NAMES]]
        return f"the keys {', '.join(names)}{', …' if len(value) > _MOST_NAMES else ''}" if names else "no keys"
    return f"a list of {len(value)}" if isinstance(value, list) else _kind(value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _number(value: Any, sample: Sample, what: str) -> float:
    number = math.nan
    if isinstance(value, bool | int | float):
        try:
            number = float(value)
        except OverflowError:  # an integer that is too large
            number = math.inf
    if not math.isfinite(number):
        said = str(number) if isinstance(value, bool | int | float) else _kind(value)
        raise RewardError(f"{what}: the score is {said}, not a finite number\n  for {describe_prompt(sample.prompt)}")
    return number
