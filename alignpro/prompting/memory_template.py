"""How past rewrites are written into the prompter's input: a Jinja template around the text of its user turn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignpro.errors import ConfigError
from alignpro.prompting.jinja_source import parse_template

_BUILT_IN = Path(__file__).with_name("memory_templates")
_VARIABLES = ("request", "best", "worst")


@dataclass(frozen=True)
class PastRewrite:
    """A rewrite of a training prompt, and what it was worth."""

    prompt: str
    """The text that was rewritten: x."""
    rewrite: str
    """x'."""
    reward: float
    """Mean of R over the samples of this rewrite."""
    step: int
    """The step that sampled it last, counted from 1."""
    count: int = 1
    """Number of these samples."""


class MemoryTemplate:
    """Puts past rewrites before the text of the prompter's user turn.

    Its variables are ``request``, the text that the meta-prompt makes of x, and ``best`` and ``worst``, lists of past rewrites
    in descending and in ascending order of their rewards, each with ``prompt``, ``rewrite``, ``reward`` and ``step``. Texts are
    never interpreted as Jinja.

    Args:
        source: The template.
        name: Its name in messages.

    Raises:
        ConfigError: It is not a Jinja template, uses other variables, or lacks ``request``.
    """

    def __init__(self, source: str, name: str) -> None:
        self.source, self._name = source, name
        self._template, _ = parse_template(f"memory.template {name}", source, _VARIABLES, "request")
        self.version: str = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        """16 hexadecimal digits that depend on the source: equal ones write the same."""

    @classmethod
    def read(cls, name: str) -> MemoryTemplate:
        """Read a built-in template, or a file.

        Raises:
            ConfigError: There is none of that name, it is not UTF-8, or it cannot be used.
        """
        built_in = _BUILT_IN / f"{name}.jinja"
        path = built_in if Path(name).name == name and built_in.is_file() else Path(name).expanduser()
        if not path.is_file():
            names = ", ".join(sorted(each.stem for each in _BUILT_IN.glob("*.jinja")))
            raise ConfigError(f"memory.template {name}: no such template; expected {names}, or a Jinja file")
        try:
            return cls(path.read_text(encoding="utf-8-sig"), name)
        except UnicodeDecodeError as error:
            raise ConfigError(f"memory.template {name}: not UTF-8") from error

    def render(self, request: str, best: Sequence[PastRewrite], worst: Sequence[PastRewrite]) -> str:
        """The text of the user turn.

        Raises:
            ConfigError: The template fails on these texts.
        """
        try:
            return self._template.render(request=request, best=list(best), worst=list(worst))
        except Exception as error:  # a template may raise any error of Python
            raise ConfigError(
                f"memory.template {self._name}: {type(error).__name__}: {error} (request {request[:60]!r})"
            ) from error
