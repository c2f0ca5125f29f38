"""The log-probabilities of an answer's tokens in OpenAI's form: of chats, and of completions.

A token is named by its text as it stands within a text; one that holds only part of a character, by its bytes: ``bytes:\\xc3``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from alignpro.engine import TokenLogprobs
from alignpro.serving.contract import Api

LEAST = -9999.0
"""Stands for −∞, which JSON does not have."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class TokenText(NamedTuple):
    """What a token is for a client."""

    text: str
    bytes: bytes


class TokenTexts:
    """The texts of single tokens.

    Args:
        tokenizer: Whose tokens they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Behind another token, since some tokenizers drop the space at the beginning of a text.
        self._before: list[int] = list(tokenizer.encode("a", add_special_tokens=False))
        self._length = len(self._decode([]))
        self._known: dict[int, TokenText] = {}

    def __call__(self, token: int) -> TokenText:
        """The text of a token id, special ones too; empty for an id without a token."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> TokenText:
        text = self._decode([token])[self._length :]
        name = self._tokenizer.convert_ids_to_tokens(token)
        raw = _bytes_of(name) if _REPLACEMENT in text and isinstance(name, str) else None
        if raw is None:
            return TokenText(text, text.encode())
        return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *tokens], clean_up_tokenization_spaces=False))


class AnswerLogprobs:
    """The log-probabilities of one draw, given out as its text is.

    Args:
        api: Whose form they have.
        texts: The texts of tokens.
        decode: Tokens → text of the answer.
    """

    def __init__(self, api: Api, texts: TokenTexts, decode: Callable[[Sequence[int]], str]) -> None:
        self._api, self._texts, self._decode = api, texts, decode
        self._given = 0

    def within(self, text: str, tokens: Sequence[int], records: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Those of the tokens of ``text``, the beginning of the answer that a client has; None if there are no new ones.

        Args:
            text: The beginning of the answer.
            tokens: Of the answer so far.
            records: Of its sampled tokens, in order; there may be more.
        """
        if len(records) == self._given:  # as if nobody asks
            return None
        ends = range(len(tokens), self._given, -1)
        count = next((end for end in ends if text.startswith(self._decode(tokens[:end]))), self._given)
        return self.rest(tokens[:count], records)

    def rest(self, tokens: Sequence[int], records: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Those of all tokens that have not been given; None if there are none."""
        first = self._given
        found = self.whole(tokens, records)
        return found if self._given > first else None

    def whole(self, tokens: Sequence[int], records: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Those of all tokens that have not been given, as far as they were sampled: what a stop text cuts was not."""
        first = self._given
        for token, record in zip(tokens[first:], records[first:], strict=False):
            if token != record.token:
                break
            self._given += 1
        new = records[first : self._given]
        if self._api == "chat":
            return {"content": [self._of_chat(record) for record in new], "refusal": None}
        return self._of_completion(new, [self._offset(tokens[:place]) for place in range(first, self._given)])

    def _of_chat(self, record: TokenLogprobs) -> dict[str, Any]:
        own = self._named(record.token, record.logprob)
        return {**own, "top_logprobs": [self._named(token, logprob) for token, logprob in record.top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(raw)}

    def _of_completion(self, records: Sequence[TokenLogprobs], offsets: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._texts(record.token).text for record in records],
            "token_logprobs": [max(record.logprob, LEAST) for record in records],
            "top_logprobs": [self._by_text(record) for record in records],
            "text_offset": list(offsets),
        }

    def _by_text(self, record: TokenLogprobs) -> Mapping[str, float]:
        """The likeliest tokens and the own one by text; of two with one text the likelier."""
        found: dict[str, float] = {}
        for token, logprob in (*record.top, (record.token, record.logprob)):
            found.setdefault(self._texts(token).text, max(logprob, LEAST))
        return found

    def _offset(self, tokens: Sequence[int]) -> int:
        """Where the token after these begins in the text, in characters."""
        return len(self._decode(tokens).rstrip(_REPLACEMENT))


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token by its name in the vocabulary; None if the name is of neither known kind."""
    if found := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(found[1], 16)])
    codes = [_ALPHABET.get(character) for character in name]
    return bytes(code for code in codes if code is not None) if None not in codes else None


def _byte_alphabet() -> dict[str, int]:
    """The character of byte-level BPE → its byte, as GPT-2 numbers them: bytes that cannot be seen follow 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


_ALPHABET = _byte_alphabet()
