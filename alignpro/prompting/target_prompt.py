"""The target's prompt: a rewrite x' → the target's tokens, and its sampled tokens → the response y.

The two models may have different tokenizers and templates, so the rewrite passes between them as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from alignpro.data import Message, Prompt
from alignpro.errors import DataError
from alignpro.prompting.chat_template import ChatTemplate


@dataclass(frozen=True)
class SentRewrite:
    """A rewrite as a target receives it."""

    text: str
    """The last turn as it was sent."""
    empty: bool
    """Whether the rewrite was empty; ``on_empty`` determines what was sent."""
    dropped: int
    """Characters dropped from the end of an over-long rewrite."""


@dataclass(frozen=True)
class TargetPrompt(SentRewrite):
    """A rewrite as a target in this process receives it."""

    tokens: list[int]
    """The target's prompt: its template around the conversation with x' as the last turn."""


class TargetTemplate:
    """The target's side: x' → ids, sampled ids → y.

    The target sees the conversation of the prompt with x' in place of its last turn. Special cases:

    - *empty* (only whitespace): with ``on_empty="send"`` the target gets an empty user turn, and its response is scored
      as usual; with ``"original"`` it gets x.
    - *truncated* (no end token): sent as it is.
    - *over-long* (the input has more than ``max_tokens`` ids): the longest prefix of x' that fits is sent.

    Args:
        tokenizer: The target's tokenizer.
        template: As for `ChatTemplate`.
        max_tokens: Maximum length of the input in the target's ids: its context minus the budget of the response.
        on_empty: What to send for an empty rewrite.
        stop_token_ids: As for `ChatTemplate`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        *,
        max_tokens: int,
        on_empty: Literal["send", "original"] = "send",
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.chat = ChatTemplate(tokenizer, template, stop_token_ids=stop_token_ids)
        self.max_tokens = max_tokens
        self.on_empty = on_empty

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self.chat.stop_token_ids

    def encode(self, prompt: Prompt, rewrite: str | None) -> TargetPrompt:
        """Encode the target's input for a rewrite of ``prompt``; None stands for the prompt as it is, which is never cut.

        Raises:
            DataError: The turns before the last one leave no room (see `encode_context`), or the template refuses
                the conversation.
        """
        if rewrite is None:
            return TargetPrompt(prompt.text, False, 0, self.chat.encode(prompt.messages))
        text, empty = text_to_send(prompt, rewrite, self.on_empty)
        tokens = self._tokens(prompt, text)
        if len(tokens) <= self.max_tokens:
            return TargetPrompt(text, empty, 0, tokens)
        sent = self._longest_fitting(prompt, text)
        return TargetPrompt(sent, empty, len(text) - len(sent), self._tokens(prompt, sent))

    def encode_context(self, prompt: Prompt) -> list[int]:
        """Encode the target's input without the last turn's text; a prompt for which this is too long cannot be used."""
        return self._tokens(prompt, "")

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode sampled ids to the response y, stripped."""
        return self.chat.decode(tokens)

    def _tokens(self, prompt: Prompt, text: str) -> list[int]:
        return self.chat.encode((*prompt.context, Message("user", text)))

    def _longest_fitting(self, prompt: Prompt, text: str) -> str:
        """Return the longest prefix of the text that fits.

        It is bisected over characters, since a cut between ids may change how the tokenizer merges the text.
        """
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self._tokens(prompt, text[:middle])) <= self.max_tokens:
                fits = middle
            else:
                too_long = middle
        if fits == 0 and len(self.encode_context(prompt)) > self.max_tokens:
            raise DataError(
                f"prompt {prompt.source or prompt.id}: the turns before the last one do not fit in the {self.max_tokens} "
                "tokens that the target has for its input; lower respond.max_tokens, or leave the prompt out"
            )
        return text[:fits]


def text_to_send(prompt: Prompt, rewrite: str, on_empty: Literal["send", "original"]) -> tuple[str, bool]:
    """The last turn that a target gets for a rewrite, and whether the rewrite was empty."""
    if rewrite.strip():
        return rewrite, False
    return (prompt.text if on_empty == "original" else ""), True
