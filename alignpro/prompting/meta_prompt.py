"""The meta-prompt: the instruction around x that asks the prompter for a rewrite."""

from __future__ import annotations

from pathlib import Path

import jinja2

from alignpro.data import Message, Prompt
from alignpro.errors import ConfigError
from alignpro.prompting.jinja_source import parse_template

_BUILT_IN = Path(__file__).with_name("meta_prompts")
_VARIABLES = ("prompt", "history")


class MetaPrompt:
    """The instruction around x for the prompter: a Jinja template that renders the text of one user turn.

    Its variables are ``prompt``, the user's last turn x, and ``history``, the turns before it, each with ``role`` and
    ``content``. A template that uses ``history`` renders the whole input. If it does not, those turns precede the text as
    turns of the prompter's conversation. The content of x is never interpreted as Jinja.

    Args:
        name: A built-in meta-prompt (`available_meta_prompts`), or a file.

    Raises:
        ConfigError: The meta-prompt does not exist, is not a Jinja template, uses other variables, or lacks ``prompt``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = source = _read_meta_prompt(name)
        self._template, variables = parse_template(f"prompting.meta_prompt {name}", source, _VARIABLES, "prompt")
        self.uses_history = "history" in variables
        self.doc = _leading_comment(source)

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """Return the prompter's conversation for this prompt.

        Raises:
            ConfigError: The template fails on this prompt.
        """
        try:
            text = self._template.render(prompt=prompt.text, history=prompt.context)
        except Exception as error:  # a template may raise any error of Python
            kind = "" if isinstance(error, jinja2.TemplateError) else f"raises {type(error).__name__}: "
            raise ConfigError(
                f"prompting.meta_prompt {self.name}: {kind}{error} (prompt {prompt.source or prompt.id})"
            ) from error
        return (*(() if self.uses_history else prompt.context), Message("user", text))


def available_meta_prompts() -> dict[str, str]:
    """Return the names of the built-in meta-prompts, each with its description."""
    names = sorted(path.stem for path in _BUILT_IN.glob("*.jinja"))
    return {name: MetaPrompt(name).doc for name in names}


def _read_meta_prompt(name: str) -> str:
    built_in = _BUILT_IN / f"{name}.jinja"
    path = built_in if Path(name).name == name and built_in.is_file() else Path(name).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in _BUILT_IN.glob("*.jinja")))
        raise ConfigError(f"prompting.meta_prompt {name}: no such meta-prompt; expected {names}, or a Jinja file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompting.meta_prompt {name}: not UTF-8") from error


def _leading_comment(source: str) -> str:
    """Return the text of the ``{# … #}`` that opens a template, on one line."""
    for _, kind, text in jinja2.Environment().lex(source):
        if kind == "comment":
            return " ".join(text.split())
        if kind == "data" and text.strip():
            break
    return ""
