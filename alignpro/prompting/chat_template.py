"""Converts conversations to tokens and back with a tokenizer's chat template, and keeps special tokens out of user text.

A chat template renders a conversation as one string, in which special tokens delimit the turns. How content is kept from
producing such tokens is the subject of `plain_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alignpro.data import Message
from alignpro.errors import DataError, ModelError
from alignpro.prompting.plain_text import PlainTextEncoder, structural_tokens
from alignpro.prompting.reasoning import TAGS, opened_reasoning, without_reasoning
from alignpro.prompting.template_source import FIXED_DATE, read_chat_template, with_fixed_date

ROLES = ("system", "user", "assistant")

_PROBE_TEXT = '<probe> & "it\'s"\n  {{ {} }} é'
"""A template must write this as it is. It contains what templates escape, format, trim or collapse by mistake."""
_QUESTION, _ANSWER = (Message(role, f"{number} {_PROBE_TEXT}") for number, role in enumerate(("user", "assistant"), 1))
_TEMPLATE_VARIABLES: dict[str, Any] = {
    "date_string": FIXED_DATE.strftime("%d %b %Y"),
    # Qwen 3 and others: a sample is the rewrite (or the response) itself, without reasoning before it.
    "enable_thinking": False,
}


class ChatTemplate:
    """Encodes conversations and decodes samples with a tokenizer's chat template.

    Args:
        tokenizer: The model's tokenizer.
        template: As `ModelConfig.chat_template`; the tokenizer's own if None.
        stop_token_ids: Ids that end a turn, in addition to those of the tokenizer and the template.

    Raises:
        ModelError: There is no template, it refuses a user turn followed by an assistant turn, drops or changes their
            text, or no token ends a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        *,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        source = read_chat_template(template, tokenizer)
        if not source:
            raise ModelError(
                f"{self.name}: its tokenizer has no chat template; set chat_template=plain, or to a Jinja file"
            )
        self.template = source
        self._source = with_fixed_date(source)
        self._structural = structural_tokens(tokenizer, self.template)
        self._text = PlainTextEncoder(tokenizer, self._structural)
        self._opening, self._leading_space, self._ending = self._probe()
        self._known_losses: dict[tuple[tuple[str, ...], bool], str | None] = {}
        self._reasoning = opened_reasoning(self._opening)
        self.end_token_id = self._end_token()
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_token_ids: tuple[int, ...] = tuple(sorted({self.end_token_id, *eos, *stop_token_ids}))
        """Any of these ends a turn: the token that the template writes after the assistant's text, the EOS token of the
        tokenizer, and the end tokens of the model."""

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Encode a conversation, followed by the generation prompt, which opens the assistant's turn.

        Content cannot produce a structural token: if it contains the text of one, that is encoded as plain text.

        Raises:
            DataError: The template refuses the conversation (a role it does not know, turns that do not alternate), drops
                turns of its kind, or fails on it.
        """
        unknown = [message.role for message in messages if message.role not in ROLES]
        if unknown:
            raise DataError(f"a conversation has a turn of role {unknown[0]!r}; expected {', '.join(ROLES)}")
        if (lost := self._lost(tuple(message.role for message in messages), add_generation_prompt)) is not None:
            raise DataError(f"{self.name}: its chat template drops or changes the text of {lost}")
        escaped = [Message(message.role, self._text.escaped(message.content)) for message in messages]
        return self._text.encode(self._render_content(escaped, add_generation_prompt))

    def completion(self, text: str) -> list[int]:
        """Encode ``text`` as the model's completion of `encode`'s ids: its tokens and the end-of-turn token.

        They are the tokens of the assistant's turn in a whole conversation, as far as its tokens begin with those of the
        prompt. If the generation prompt opens reasoning, the completion closes it first.

        Raises:
            DataError: The template refuses the text.
        """
        escaped = self._text.escaped(text)
        if self._reasoning is not None:
            escaped = f"{self._reasoning.closing}\n\n{escaped}"
        else:
            whole = self._render_content([_QUESTION, Message("assistant", escaped)], False)
            if (ids := self._continuation_of_opening(whole)) is not None:
                return ids
            escaped = self._leading_space + escaped
        return [*self._text.encode(escaped, continues=True), self.end_token_id]

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that the template is given here and that it uses: without reasoning, and a date that does not change."""
        return {name: value for name, value in _TEMPLATE_VARIABLES.items() if name in self.template}

    @property
    def generation_prompt(self) -> list[int]:
        """The ids that open the assistant's turn, at the end of what `encode` returns.

        Raises:
            ModelError: The template writes none, or it merges with the tokens before it.
        """
        question = [Message("user", "x")]
        opened, closed = self.encode(question), self.encode(question, add_generation_prompt=False)
        if len(opened) <= len(closed) or opened[: len(closed)] != closed:
            raise ModelError(
                f"{self.name}: its chat template has no generation prompt with tokens of its own, which could invoke an "
                "activated LoRA: set policy.adapter.invocation to a text that ends every prompt"
            )
        return opened[len(closed) :]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode sampled ids, without special and stop tokens and without reasoning, stripped.

        Reasoning is what the model writes between think tags at the beginning of its turn. Where it is unfinished, nothing
        is left. Invalid UTF-8 becomes U+FFFD.
        """
        content = [token for token in tokens if token not in self.stop_token_ids]
        return without_reasoning(self._decode_with_tags(content), self._reasoning).strip()

    def _decode_with_tags(self, content: Sequence[int]) -> str:
        """Decode ids without special tokens, except for think tags."""
        known = {text for tags in TAGS for text in tags}
        tags = {token: text for token, text in self._structural.items() if text in known}
        pieces: list[str] = []
        start = 0
        for i, token in enumerate(content):
            if token in tags:
                pieces += [self._decode_text(content[start:i]), tags[token]]
                start = i + 1
        return "".join([*pieces, self._decode_text(content[start:])])

    def _decode_text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=self._source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **_TEMPLATE_VARIABLES,
        )
        assert isinstance(text, str)
        return text

    def _render_content(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Render a conversation of the data.

        Raises:
            DataError: The template refuses it, or fails.
        """
        try:
            return self._render(messages, add_generation_prompt)
        except Exception as error:  # a template may raise any error of Python
            roles = ", ".join(message.role for message in messages)
            raise DataError(
                f"{self.name}: its chat template {_failure(error)} a conversation of {roles}: {error}"
            ) from error

    def _continuation_of_opening(self, whole: str) -> list[int] | None:
        """The assistant's turn in the tokens of a conversation; None if these do not begin with those of the prompt."""
        prompt = self._opening_ids
        writes_end = self._written_end() is not None
        ids = self._text.encode(whole if writes_end else whole.removesuffix(self._ending))
        if not whole.startswith(self._opening) or ids[: len(prompt)] != prompt:
            return None
        turn = ids[len(prompt) :]
        if not writes_end:
            return [*turn, self.end_token_id]
        return turn[: turn.index(self.end_token_id) + 1] if self.end_token_id in turn else None

    @cached_property
    def _opening_ids(self) -> list[int]:
        return self._text.encode(self._opening)

    def _probe(self) -> tuple[str, str, str]:
        """Check the template on a question and its answer.

        Returns:
            The prompt that ends with the generation prompt; the space that the template writes between it and the
            assistant's text; and what it writes after that text.
        """
        try:
            opening = self._render([_QUESTION], True)
            whole = self._render([_QUESTION, _ANSWER], False)
        except Exception as error:
            raise ModelError(
                f"{self.name}: its chat template {_failure(error)} a user turn followed by an assistant turn: {error}"
            ) from error
        for message, text in ((_QUESTION, opening), (_QUESTION, whole), (_ANSWER, whole)):
            if message.content not in text:
                raise ModelError(
                    f"{self.name}: its chat template drops or changes the text of a turn of the {message.role}: of "
                    f"{message.content!r} it makes {text!r}; a template must write message['content'], a string, as it is"
                )
        before, _, ending = whole.rpartition(_ANSWER.content)
        lead = before.removeprefix(opening) if before.startswith(opening) else ""
        return opening, (lead if lead.isspace() else ""), ending

    def _lost(self, roles: tuple[str, ...], add_generation_prompt: bool) -> str | None:
        """The turns whose text the template drops or changes in a conversation of these roles; None if it writes all of them."""
        key = (roles, add_generation_prompt)
        if key not in self._known_losses:
            probes = [Message(role, f"({number}) {_PROBE_TEXT}") for number, role in enumerate(roles)]
            try:
                text = self._render(probes, add_generation_prompt)
            except Exception:  # it is reported for the conversations of the data that the template refuses
                text = "".join(probe.content for probe in probes)
            lost = next((probe.role for probe in probes if probe.content not in text), None)
            self._known_losses[key] = lost and ("system turns" if lost == "system" else "earlier turns")
        return self._known_losses[key]

    def _written_end(self) -> int | None:
        """The first structural token that the template writes after the assistant's text."""
        written = self._text.encode_whole(self._ending)
        return next((token for token in written if token in self._structural), None)

    def _end_token(self) -> int:
        """Return the first structural token after the assistant's text, else the EOS token."""
        end = self._written_end()
        if end is None:
            end = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                f"{self.name}: no token ends a turn: its chat template writes no special token after the assistant's "
                "text and its tokenizer has no eos_token; use another chat_template, or a tokenizer with eos_token set"
            )
        return end


def _failure(error: Exception) -> str:
    return "refuses" if isinstance(error, TemplateError) else f"raises {type(error).__name__} on"
