"""The rubric of a judge: a Jinja template that asks it about one response, or about two."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignpro.data import Prompt
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.component import describe_prompt

_BUILT_IN = Path(__file__).with_name("rubrics")
_COMMON = {"prompt", "history", "rewrite", "criteria", "fence"}
_VARIABLES = {"score": {"response", "reference", "low", "high"}, "pairwise": {"response_a", "response_b"}}
_REQUIRED = {"score": {"response"}, "pairwise": {"response_a", "response_b"}}


class Rubric:
    """The template of a judge's question. What it renders is data to it: texts are never interpreted as Jinja.

    Its variables are ``prompt``, the user's last turn; ``history``, the turns before it, each with ``role`` and ``content``;
    ``rewrite``, None without any; ``criteria`` of the configuration; and ``fence``, a line's beginning that occurs in none of
    the texts, to set them apart by. For a score also ``response``, ``reference`` (None without any), ``low`` and ``high``;
    for a comparison ``response_a`` and ``response_b``.

    Args:
        mode: Whether the judge grades a response, or compares two.
        file: The template; None for the built-in one of the mode.
        what: The judge's name in messages.
        criteria: What the template may ask to look for.
        scale: The worst and the best score.

    Raises:
        ConfigError: The file does not exist, is not a Jinja template, uses other variables, or lacks a response.
    """

    def __init__(
        self,
        mode: Literal["score", "pairwise"],
        file: str | None,
        what: str,
        *,
        criteria: str = "",
        scale: tuple[float, float] = (1.0, 10.0),
    ) -> None:
        self._mode, self._what, self._criteria, self._scale = mode, what, criteria, scale
        self._template, source = self._compile(_BUILT_IN / f"{mode}.jinja" if file is None else Path(file).expanduser())
        self.version: str = hashlib.sha256(json.dumps([source, criteria]).encode()).hexdigest()[:16]
        """16 hexadecimal digits that depend on the template and the criteria: equal ones ask the same."""

    def _compile(self, file: Path) -> tuple[jinja2.Template, str]:
        """The template and its source."""
        what, source = self._what, self._read(file)
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, autoescape=False, finalize=_refuse_none
        )
        try:
            used = jinja2.meta.find_undeclared_variables(environment.parse(source))
            template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{what}: rubric {file}:{error.lineno}: {error.message}") from error
        known = _COMMON | _VARIABLES[self._mode]
        if unknown := sorted(used - known):
            raise ConfigError(
                f"{what}: rubric {file}: unknown variable {unknown[0]}; of mode={self._mode} there are "
                f"{', '.join(sorted(known))}"
            )
        if missing := sorted(_REQUIRED[self._mode] - used):
            raise ConfigError(f"{what}: rubric {file}: never uses {{{{ {missing[0]} }}}}, which is to be judged")
        return template, source

    def render(self, prompt: Prompt, rewrite: str | None, **texts: str | None) -> str:
        """The question about a response.

        Args:
            prompt: The ORIGINAL prompt.
            rewrite: What the target was given instead, if anything.
            **texts: ``response`` and ``reference``, or ``response_a`` and ``response_b``.

        Raises:
            RewardError: The template fails; the message names the prompt.
        """
        all_texts = [
            *(turn.content for turn in prompt.messages),
            rewrite or "",
            *(text or "" for text in texts.values()),
        ]
        values: dict[str, Any] = {"prompt": prompt.text, "history": prompt.context, "rewrite": rewrite, **texts}
        values |= {"criteria": self._criteria, "fence": _fence(all_texts)}
        if self._mode == "score":
            values |= dict(zip(("low", "high"), (f"{end:g}" for end in self._scale), strict=True))
        try:
            return self._template.render(values)
        except Exception as error:  # a template may raise any error of Python
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise RewardError(
                f"{self._what}: the rubric cannot be rendered: {kind}{error}\n  for {describe_prompt(prompt)}"
            ) from error

    def _read(self, file: Path) -> str:
        if not file.is_file():
            raise ConfigError(f"{self._what}: rubric {file}: no such file; without `rubric` a built-in one is used")
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._what}: rubric {file}: not UTF-8") from error


def _refuse_none(value: Any) -> Any:
    if value is None:
        raise jinja2.TemplateRuntimeError(
            "it prints a text that there is none of, `rewrite` or `reference`: ask first, as in {% if rewrite is not none %}"
        )
    return value


def _fence(texts: list[str]) -> str:
    """A mark that follows from the texts, so that equal questions are equal, and that none of them can contain."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    return f"==={digest[:12]}==="
