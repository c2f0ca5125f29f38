"""Converts conversations to tokens and back with a tokenizer's chat template, and keeps special tokens out of user text.

A chat template renders a conversation as one string, in which special tokens delimit the turns. A user who writes
``<|im_end|>`` must not end the turn with it. So every structural token that occurs in a message's content is marked
before the template is applied, the rendered string is split at the marks, inside the would-be tokens, and the pieces are
encoded separately. Text without such strings, which is nearly all text, is one piece: its ids are those of
``apply_chat_template(tokenize=True)``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alignpro.data import Message, replace_lone_surrogates
from alignpro.errors import DataError, ModelError

ROLES = ("system", "user", "assistant")

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message['role']] }}: {{ message['content'] -}}
{{- (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}"""
"""``chat_template: plain``, for base models: ``User: …`` and ``Assistant: …`` on separate lines."""

_MARK = "\ufdd0"  # a noncharacter: Unicode reserves it for a program's own use
_PROBE_TEXT = "probe"

_TEMPLATE_VARIABLES: dict[str, Any] = {
    # Llama 3 writes the current date into its system turn; a fixed date keeps runs reproducible.
    "date_string": "26 Jul 2024",
    # Qwen 3 and others: a sample is the rewrite (or the response) itself, without reasoning before it.
    "enable_thinking": False,
}


def read_chat_template(name: str) -> str:
    """Return the Jinja source of a chat template: ``plain``, or the content of a file.

    Raises:
        ModelError: There is no such file, or it is not UTF-8 text.
    """
    if name == "plain":
        return PLAIN_TEMPLATE
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"chat_template {name}: no such file; expected `plain` or a Jinja file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"chat_template {name}: not UTF-8") from error


class ChatTemplate:
    """Encodes conversations and decodes samples with a tokenizer's chat template.

    Args:
        tokenizer: The model's tokenizer.
        template: ``plain`` or a Jinja file, as in `ModelConfig.chat_template`; the tokenizer's own if None.
        stop_token_ids: Ids that end a turn, in addition to those of the tokenizer and the template.

    Raises:
        ModelError: There is no template, it refuses a user turn followed by an assistant turn, or no token ends a turn.
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
        if template is None and not tokenizer.chat_template:
            raise ModelError(
                f"{self.name}: its tokenizer has no chat template; set chat_template=plain, or to a Jinja file"
            )
        self.template: str = tokenizer.get_chat_template() if template is None else read_chat_template(template)
        self._structural = _structural_tokens(tokenizer, self.template)
        try:
            self._leading_space, ending = self._probe()
        except TemplateError as error:
            raise ModelError(
                f"{self.name}: its chat template refuses a user turn followed by an assistant turn: {error}"
            ) from error
        self.end_token_id = self._end_token(ending)
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_token_ids: tuple[int, ...] = tuple(sorted({self.end_token_id, *eos, *stop_token_ids}))
        """Any of these ends a turn: the token that the template writes after the assistant's text, and the EOS token."""

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Encode a conversation, followed by the generation prompt, which opens the assistant's turn.

        Content cannot produce a structural token: if it contains the text of one, that is encoded as plain text.

        Raises:
            DataError: The template refuses the conversation (a role it does not know, turns that do not alternate).
        """
        unknown = [message.role for message in messages if message.role not in ROLES]
        if unknown:
            raise DataError(f"a conversation has a turn of role {unknown[0]!r}; expected {', '.join(ROLES)}")
        escaped = [Message(message.role, self._escaped(message.content)) for message in messages]
        try:
            return self._encode_pieces(self._render(escaped, add_generation_prompt))
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"{self.name}: its chat template refuses a conversation of {roles}: {error}") from error

    def completion(self, text: str) -> list[int]:
        """Encode ``text`` as the model's completion of `encode`'s ids: its tokens and the end-of-turn token."""
        return [*self._encode_pieces(self._leading_space + self._escaped(text)), self.end_token_id]

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
        """Decode sampled ids, without special and stop tokens, stripped; invalid UTF-8 becomes U+FFFD."""
        content = [token for token in tokens if token not in self.stop_token_ids]
        text = self.tokenizer.decode(content, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text.strip()

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **_TEMPLATE_VARIABLES,
        )
        assert isinstance(text, str)
        return text

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)  # callers check the length

    def _encode_pieces(self, text: str) -> list[int]:
        return [token for piece in text.split(_MARK) if piece for token in self._encode_text(piece)]

    def _escaped(self, content: str) -> str:
        """Insert a mark after the first character of every structural token's text in ``content``."""
        content = replace_lone_surrogates(content).replace(_MARK, "\ufffd").translate(self._replacements)
        cuts = [match.start() + 1 for match in self._pattern.finditer(content)]
        pieces = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        if self._hides_tokens(pieces):
            pieces = list(content)
        return _MARK.join(pieces)

    def _hides_tokens(self, pieces: Sequence[str]) -> bool:
        """Whether normalisation (NFKC, lower case) turns text that did not look like a structural token into one."""
        if not self._is_normalized:
            return False
        forbidden = self._structural.keys() - {self.tokenizer.unk_token_id}
        return any(token in forbidden for piece in pieces if piece for token in self._encode_text(piece))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        texts = sorted((text for text in self._structural.values() if len(text) > 1), key=len, reverse=True)
        # A lookahead also finds overlapping tokens, each of which must be cut.
        return re.compile(f"(?={'|'.join(map(re.escape, texts))})" if texts else r"(?!)")

    @cached_property
    def _replacements(self) -> dict[int, str]:
        """Special tokens of one character → U+FFFD: they cannot be cut, so they cannot be encoded as plain text."""
        added = self.tokenizer.added_tokens_decoder
        return {
            ord(text): "\ufffd"
            for token, text in self._structural.items()
            if len(text) == 1 and token in added and added[token].special
        }

    @cached_property
    def _is_normalized(self) -> bool:
        added = self.tokenizer.added_tokens_decoder
        return any(token in added and added[token].normalized for token in self._structural)

    def _probe(self) -> tuple[str, str]:
        """Return what the template writes between the generation prompt and the assistant's text, and after that text."""
        question = [Message("user", "x")]
        opening = self._render(question, True)
        before, _, ending = self._render([*question, Message("assistant", _PROBE_TEXT)], False).rpartition(_PROBE_TEXT)
        lead = before.removeprefix(opening) if before.startswith(opening) else ""
        return (lead if lead.isspace() else ""), ending

    def _end_token(self, ending: str) -> int:
        """Return the first structural token after the assistant's text, else the EOS token."""
        written = [token for token in self._encode_text(ending) if token in self._structural] if ending else []
        end = written[0] if written else self.tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                f"{self.name}: no token ends a turn: its chat template writes no special token after the assistant's "
                "text and its tokenizer has no eos_token; use another chat_template, or a tokenizer with eos_token set"
            )
        return end


def _structural_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[int, str]:
    """Return id → text of the structural tokens: special tokens, and added tokens that the template writes."""
    added = {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace() and len(token.content) > 1)
    }
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {**special, **added}
