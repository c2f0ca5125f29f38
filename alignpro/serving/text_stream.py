"""The text of a response while it is generated: what can be sent already, and will not be taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignpro.prompting.reasoning import TAGS


class TextStream:
    """Turns the growing tokens of a response into pieces of its text, which together are the text of all tokens.

    Held back are the beginning of a character, of a stop text, and of reasoning.

    Args:
        decode: Tokens → text.
        stops: Texts that end the response and are no part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._decode, self._stops = decode, stops
        self._sent = ""

    @property
    def sent(self) -> str:
        """What can have been sent."""
        return self._sent

    def push(self, tokens: Sequence[int]) -> str:
        """What can be sent now."""
        text = self._decode(tokens).rstrip("\ufffd")
        if any(tags.opening.startswith(text.lstrip()) for tags in TAGS):
            return ""
        return self._send(text[: len(text) - self._held(text)])

    def finish(self, text: str) -> str:
        """The rest, once the text is known."""
        return self._send(text)

    def _held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop text."""
        lengths = (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(lengths, default=0)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new
