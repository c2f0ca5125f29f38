"""A rewrite by rule: a text that is appended to a prompt, or a template around it."""

from __future__ import annotations

from functools import cached_property

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignpro.errors import ConfigError

_MARK = "\x00"
"""Stands for the prompt where the text around it is asked for; no prompt that a model reads contains it."""

_ORDINARY = (
    "why is the sky blue?",
    "x",
    "Write TWO lines about Rome:\n\n  - one short\n  - one long",
    "explain dns, " * 200 + "please",
)
"""Prompts that a template might change by case, length, punctuation or line feeds."""


class RewriteTemplate:
    """Rewrites every prompt alike: x → x'.

    Args:
        text: A Jinja template with ``{{ prompt }}``, the text of the last user turn; a text without it is appended to the
            prompt after a blank line. The content of a prompt is never interpreted as Jinja.
        where: The key or the file that the text is from, for errors.

    Raises:
        ConfigError: The text is empty, is no Jinja template, or uses other variables.
    """

    def __init__(self, text: str, where: str) -> None:
        if not text.strip():
            raise ConfigError(f"{where}: is empty; expected a text to append, or a template with {{{{ prompt }}}}")
        environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        self.text = text
        self._where = where
        try:
            variables = jinja2.meta.find_undeclared_variables(environment.parse(text))
            if variables - {"prompt"}:
                unknown = ", ".join(sorted(variables - {"prompt"}))
                raise ConfigError(f"{where}: unknown variable {unknown}; a template has {{{{ prompt }}}} only")
            self._template = environment.from_string(text if variables else "{{ prompt }}\n\n" + text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{where}: not a Jinja template: line {error.lineno}: {error.message}") from error
        before, *_, after = self(_MARK).split(_MARK) if _MARK in self(_MARK) else ("", "")
        self.before = before.strip()
        """The text before the prompt, stripped."""
        self.after = after.strip()
        """The text after the prompt, stripped."""

    def __call__(self, prompt: str) -> str:
        """The rewrite of a prompt.

        Raises:
            ConfigError: The template fails on this prompt.
        """
        try:
            return self._template.render(prompt=prompt)
        except Exception as error:  # a template may raise any error of Python
            raise ConfigError(f"{self._where}: {type(error).__name__}: {error} (prompt {prompt[:60]!r})") from error

    @cached_property
    def adds(self) -> bool:
        """Whether it leaves prompts as they are, and adds a text after white space: tried on a few of different kinds.

        Raises:
            ConfigError: As calling it.
        """
        if self(_MARK).count(_MARK) != 1:
            return False
        rests = [self(text).strip().partition(text) for text in _ORDINARY]
        return all(not before and found and rest[:1] in ("", " ", "\n", "\t") for before, found, rest in rests)

    def matches(self, rewrite: str) -> bool:
        """Whether a rewrite has this template's text around it, whatever is between; never of a template without any."""
        text = rewrite.strip()
        if (not self.before and not self.after) or len(text) < len(self.before) + len(self.after):
            return False
        return text.startswith(self.before) and text.endswith(self.after)
