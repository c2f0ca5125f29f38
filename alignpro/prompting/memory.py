"""The memory of past rewrites: what training prompts were rewritten to, with rewards, and which of it a prompt is shown.

| owns | does not own |
|---|---|
| past rewrites, their ranking, retrieval, the file format | when rewrites are added, where the file lies, how much of it fits |

Of each prompt the best and the worst rewrites are kept, as many as can be shown: what retrieval could never show is not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from alignpro.config import MemoryConfig
from alignpro.data import Prompt
from alignpro.errors import ConfigError, ModelError
from alignpro.prompting.bm25 import BM25, terms
from alignpro.prompting.memory_template import MemoryTemplate, PastRewrite

FILE_NAME = "memory.jsonl"
"""Of the memory, in a run directory, in a checkpoint and beside a saved prompter."""
_FORMAT = 1


@dataclass(frozen=True)
class Recalled:
    """What a prompt is shown."""

    best: tuple[PastRewrite, ...]
    """In descending order of rewards."""
    worst: tuple[PastRewrite, ...]
    """In ascending order of rewards, all below those of ``best``."""


@dataclass(frozen=True)
class _Remembered:
    """A training prompt with its kept rewrites."""

    text: str
    rewrites: tuple[PastRewrite, ...]

    @cached_property
    def terms(self) -> list[str]:
        """What similarity is computed from."""
        return terms(self.text)


class Memory:
    """Past rewrites of training prompts.

    Args:
        config: How many are kept and shown.
        template: Writes them into the prompter's input; by default the one that ``config`` names.

    Raises:
        ConfigError: There is no such template, or it cannot be used.
    """

    def __init__(self, config: MemoryConfig, template: MemoryTemplate | None = None) -> None:
        self.config = config
        self.template = template or MemoryTemplate.read(config.template)
        self.version = 0
        """Counts the changes: what was recalled at another version may differ."""
        self._prompts: dict[str, _Remembered] = {}  # id of a prompt → its rewrites; the prompt added last is last
        self._index: BM25 | None = None

    def __len__(self) -> int:
        """Number of prompts of which it has rewrites."""
        return len(self._prompts)

    @property
    def rewrites(self) -> list[PastRewrite]:
        """All that is kept, prompt by prompt, the prompt added last last."""
        return [each for known in self._prompts.values() for each in known.rewrites]

    def holds(self, prompt: Prompt) -> bool:
        """Whether it has rewrites of this prompt."""
        return prompt.id in self._prompts

    def add(
        self,
        step: int,
        prompts: Sequence[Prompt],
        rewrites: Sequence[Sequence[str]],
        rewards: Sequence[Sequence[float]],
    ) -> None:
        """Add the rewrites of a step; an empty one says nothing and is left out.

        Args:
            step: The step, counted from 1.
            prompts: P training prompts.
            rewrites: [P][K].
            rewards: [P][K].
        """
        for prompt, texts, values in zip(prompts, rewrites, rewards, strict=True):
            known = self._prompts.pop(prompt.id, _Remembered(prompt.text, ()))
            found = {each.rewrite: each for each in known.rewrites}
            for text, reward in zip(texts, values, strict=True):
                if text.strip():
                    found[text] = _averaged(found.get(text), PastRewrite(prompt.text, text, reward, step))
            if kept := self._kept(list(found.values())):
                self._prompts[prompt.id] = _Remembered(prompt.text, kept)
        while len(self._prompts) > self.config.size:
            del self._prompts[next(iter(self._prompts))]
        self._changed()

    def recall(self, prompt: Prompt) -> Recalled:
        """The best and the worst rewrites of the prompts that are most similar to this one."""
        pool = [each for known in self._similar(prompt.text) for each in known.rewrites]
        best = _highest(pool)[: self.config.best]
        below = best[-1].reward if best else math.inf
        worst = [each for each in _lowest(pool) if each.reward < below]
        return Recalled(tuple(best), tuple(worst[: self.config.worst]))

    def dumps(self) -> bytes:
        """The file: a line with settings and template, and a line for each rewrite."""
        head = {"format": _FORMAT, "settings": self.config.model_dump(), "template": self.template.source}
        rows = [{"id": key, **vars(each)} for key, known in self._prompts.items() for each in known.rewrites]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *rows))
        return text.encode("utf-8", "backslashreplace")  # which turns lone surrogates into JSON escapes

    @classmethod
    def loads(cls, content: bytes, where: Path) -> Memory:
        """Read what `dumps` returned.

        Args:
            content: Of the file.
            where: The file, for messages.

        Raises:
            ModelError: It was not written by this version, or a line is damaged; the message names the line.
        """
        number = 1
        try:
            head, *rows = content.decode("utf-8").removesuffix("\n").split("\n")
            settings = json.loads(head)
            if (version := settings["format"]) != _FORMAT:
                raise ModelError(
                    f"{where}: is a memory of format {version}, and this version of Align-Pro reads {_FORMAT}: use the version "
                    "that wrote it"
                )
            memory = cls(
                MemoryConfig.model_validate(settings["settings"]), MemoryTemplate(settings["template"], str(where))
            )
            for number, line in enumerate(rows, start=2):  # noqa: B007 - for the message
                memory._insert(json.loads(line))
        except (ValueError, KeyError, TypeError, ConfigError, ValidationError) as error:
            raise ModelError(
                f"{where}:{number}: the memory of past rewrites is damaged ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}): restore the file"
            ) from error
        memory._changed()
        return memory

    def restore(self, other: Memory) -> None:
        """Take over the rewrites of another memory with the same settings."""
        self._prompts = dict(other._prompts)
        self._changed()

    def _insert(self, row: dict[str, Any]) -> None:
        key = row.pop("id")
        each = PastRewrite(**row)
        for value, kind in ((key, str), (each.prompt, str), (each.rewrite, str), (each.step, int), (each.count, int)):
            if not isinstance(value, kind):
                raise ValueError(f"expected a {kind.__name__}, got {value!r:.60}")
        if not isinstance(each.reward, float) or not math.isfinite(each.reward):
            raise ValueError(f"reward={each.reward!r:.60}: expected a finite number")
        before = self._prompts.get(key, _Remembered(each.prompt, ()))
        self._prompts[key] = replace(before, rewrites=(*before.rewrites, each))

    def _changed(self) -> None:
        self.version += 1
        self._index = None

    def _similar(self, text: str) -> list[_Remembered]:
        """The most similar prompts, the most similar first; of equally similar ones, that added last."""
        known = list(self._prompts.values())
        if self._index is None:
            self._index = BM25([each.terms for each in known])
        scores = self._index.scores(terms(text))
        order = sorted(scores, key=lambda i: (-scores[i], -i))
        usable = (known[i] for i in order if self.config.own or known[i].text != text)
        return [each for each, _ in zip(usable, range(self.config.similar), strict=False)]

    def _kept(self, found: list[PastRewrite]) -> tuple[PastRewrite, ...]:
        shown = [*_highest(found)[: self.config.best], *_lowest(found)[: self.config.worst]]
        return tuple(each for each in found if any(each is other for other in shown))


def _averaged(known: PastRewrite | None, new: PastRewrite) -> PastRewrite:
    """The same rewrite sampled again: R is noisy, and its mean is what it is worth."""
    if known is None:
        return new
    count = known.count + 1
    return replace(new, reward=known.reward + (new.reward - known.reward) / count, count=count)


def _highest(found: list[PastRewrite]) -> list[PastRewrite]:
    """In descending order of rewards; of equal ones, the later first."""
    return sorted(found, key=lambda each: (-each.reward, -each.step))


def _lowest(found: list[PastRewrite]) -> list[PastRewrite]:
    """In ascending order of rewards; of equal ones, the later first."""
    return sorted(found, key=lambda each: (each.reward, -each.step))


def read_memory(directory: str | Path) -> Memory | None:
    """The memory of a saved prompter; None if it has none.

    Args:
        directory: Of the model; a name on the hub has none.

    Raises:
        ModelError: It cannot be read.
    """
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: the memory of past rewrites cannot be read: {error}") from error
    return Memory.loads(content, path)
