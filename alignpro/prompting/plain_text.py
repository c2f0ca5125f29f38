"""Encodes text in which the text of special tokens is plain text, with tokenizers of every kind.

A user who writes ``<|im_end|>`` must not end the turn with it. So every structural token that occurs in a message's content
is marked before the template is applied, the rendered string is split at the marks, inside the would-be tokens, and the
pieces are encoded separately. Text without such strings, which is nearly all text, is one piece: its ids are those of
``apply_chat_template(tokenize=True)``.

SentencePiece, and byte-level BPE with ``add_prefix_space``, mark the beginning of a text with a space. A piece that
continues a text must not begin with one, so it is encoded behind a text whose tokens are then removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from alignpro.data import replace_lone_surrogates
from alignpro.errors import DataError

_MARK = "\ufdd0"  # a noncharacter: Unicode reserves it for a program's own use
_ANCHORS = ("\n", "|", "=", "#", "~", ".", "0", "q", "\ufdd1")
"""Texts behind which a continuation may be encoded; one is used if its tokens stay apart from those that follow."""
_SPACES = ("\u2581", "\u0120")
"""How the tokens of SentencePiece and of byte-level BPE write a space."""


class PlainTextEncoder:
    """Encodes rendered conversations whose contents have been escaped.

    Args:
        tokenizer: The tokenizer.
        structural: Id → text of the tokens that content must not produce (`structural_tokens`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, structural: dict[int, str]) -> None:
        self._tokenizer = tokenizer
        self._structural = structural

    def escaped(self, content: str) -> str:
        """Insert a mark after the first character of every structural token's text in ``content``."""
        content = replace_lone_surrogates(content).replace(_MARK, "\ufffd").translate(self._replacements)
        cuts = [match.start() + 1 for match in self._pattern.finditer(content)]
        pieces = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        if self._hides_tokens(pieces):
            pieces = list(content)
        return _MARK.join(pieces)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Encode a text with marks, without the tokenizer's BOS token.

        Args:
            text: The text.
            continues: Whether it continues a text, so that no token marks its beginning.

        Raises:
            DataError: The tokenizer cannot encode a text that continues another.
        """
        first, *others = text.split(_MARK)
        ids = self._continuation(first) if continues else self.encode_whole(first)
        return [*ids, *(token for piece in others for token in self._continuation(piece))]

    def encode_whole(self, text: str) -> list[int]:
        """Encode a text, in which the text of a special token gives that token."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False) if text else []

    def _continuation(self, text: str) -> list[int]:
        if not text or not self._marks_beginnings:
            return self.encode_whole(text)
        for anchor, ids in self._anchors:
            joined = self.encode_whole(anchor + text)
            if joined[: len(ids)] == ids:
                return joined[len(ids) :]
        raise DataError(
            f"{self._tokenizer.name_or_path}: its tokenizer cannot encode {text[:40]!r} as the continuation of a text"
        )

    def _begins_with_space(self, ids: Sequence[int]) -> bool:
        tokens = self._tokenizer.convert_ids_to_tokens(list(ids[:1]))
        return bool(tokens) and str(tokens[0]).startswith(_SPACES)

    @cached_property
    def _marks_beginnings(self) -> bool:
        return self._begins_with_space(self.encode_whole("x"))

    @cached_property
    def _anchors(self) -> list[tuple[str, list[int]]]:
        """Texts with their tokens, which stay apart from a text behind them, and that text does not begin with a space."""
        encoded = [(anchor, self.encode_whole(anchor)) for anchor in _ANCHORS]
        behind = [(anchor, ids, self.encode_whole(anchor + "x")) for anchor, ids in encoded]
        return [
            (anchor, ids)
            for anchor, ids, joined in behind
            if joined[: len(ids)] == ids and not self._begins_with_space(joined[len(ids) :])
        ]

    def _hides_tokens(self, pieces: Sequence[str]) -> bool:
        """Whether normalisation (NFKC, lower case) turns text that did not look like a structural token into one."""
        if not self._is_normalized:
            return False
        forbidden = self._structural.keys() - {self._tokenizer.unk_token_id}
        return any(token in forbidden for piece in pieces for token in self.encode_whole(piece))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        texts = sorted((text for text in self._structural.values() if len(text) > 1), key=len, reverse=True)
        # A lookahead also finds overlapping tokens, each of which must be cut.
        return re.compile(f"(?={'|'.join(map(re.escape, texts))})" if texts else r"(?!)")

    @cached_property
    def _replacements(self) -> dict[int, str]:
        """Special tokens of one character → U+FFFD: they cannot be cut, so they cannot be encoded as plain text."""
        added = self._tokenizer.added_tokens_decoder
        return {
            ord(text): "\ufffd"
            for token, text in self._structural.items()
            if len(text) == 1 and token in added and added[token].special
        }

    @cached_property
    def _is_normalized(self) -> bool:
        added = self._tokenizer.added_tokens_decoder
        return any(token in added and added[token].normalized for token in self._structural)


def structural_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> dict[int, str]:
    """Return id → text of the structural tokens: special tokens, and added tokens that the template writes."""
    added = {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and not token.content.isspace() and len(token.content) > 1)
    }
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {**special, **added}
