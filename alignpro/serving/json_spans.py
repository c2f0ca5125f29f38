"""Where values are in the bytes of a JSON document, so that one can be replaced and all others stay as they were written.

Parsing and writing again would change the spelling of numbers, the order and repetition of keys, white space and escapes. So
the document is parsed to decide what to replace, and this scanner finds the bytes. It reads what `json.loads` has accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_SPACE = re.compile(rb"[ \t\n\r]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\n\r,\]}]+")
_MARK = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
"""What decides where a nested value ends: brackets, and the strings in which they do not count."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Span(NamedTuple):
    """The bytes ``start``..``end`` of a value, without the white space around it."""

    start: int
    end: int

    def of(self, raw: bytes) -> bytes:
        """The bytes themselves."""
        return raw[self.start : self.end]


class Member(NamedTuple):
    """A key with its value."""

    key: str
    start: int
    """Where the key begins; the member ends with its value."""
    value: Span


@dataclass(frozen=True)
class Edit:
    """Bytes to put in the place of others."""

    span: Span
    new: bytes


def root(raw: bytes) -> Span:
    """The document's value.

    Raises:
        ValueError: It is not in UTF-8, or no JSON.
    """
    if json.detect_encoding(raw) not in ("utf-8", "utf-8-sig"):
        raise ValueError("the document is not in UTF-8")
    start = _skip_space(raw, len(_BYTE_ORDER_MARK) if raw.startswith(_BYTE_ORDER_MARK) else 0)
    return Span(start, _end(raw, start))


def members(raw: bytes, span: Span) -> dict[str, Span]:
    """The values of an object by key; of a key that is repeated the last one, as `json.loads` has it.

    Raises:
        ValueError: There is no object.
    """
    return {member.key: member.value for member in each_member(raw, span)}


def each_member(raw: bytes, span: Span) -> Iterator[Member]:
    """The members of an object in their order, repeated keys too.

    Raises:
        ValueError: There is no object.
    """
    at = _opened(raw, span, b"{")
    while raw[at : at + 1] != b"}":
        start, key_end = at, _end(raw, at)
        at = _expect(raw, _skip_space(raw, key_end), b":")
        value = Span(at, _end(raw, at))
        yield Member(json.loads(raw[start:key_end]), start, value)
        at = _next(raw, value.end, b"}")


def elements(raw: bytes, span: Span) -> list[Span]:
    """The values of an array.

    Raises:
        ValueError: There is no array.
    """
    found: list[Span] = []
    at = _opened(raw, span, b"[")
    while raw[at : at + 1] != b"]":
        found.append(Span(at, _end(raw, at)))
        at = _next(raw, found[-1].end, b"]")
    return found


def edited(raw: bytes, edits: Sequence[Edit]) -> bytes:
    """The document with some of its bytes replaced; the spans do not overlap."""
    pieces, at = [], 0
    for edit in sorted(edits, key=lambda each: each.span):
        pieces += [raw[at : edit.span.start], edit.new]
        at = edit.span.end
    return b"".join([*pieces, raw[at:]])


def _end(raw: bytes, at: int) -> int:
    """Where the value that begins at ``at`` ends."""
    first = raw[at : at + 1]
    if first not in (b"{", b"["):
        match = (_STRING if first == b'"' else _SCALAR).match(raw, at)
        if match is None:
            raise ValueError(f"no JSON value at byte {at}")
        return match.end()
    depth = 0
    for mark in _MARK.finditer(raw, at):
        if mark[0] in (b"{", b"["):
            depth += 1
        elif mark[0] in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                return mark.end()
    raise ValueError(f"the JSON value at byte {at} does not end")


def _skip_space(raw: bytes, at: int) -> int:
    match = _SPACE.match(raw, at)
    assert match is not None  # it may be empty
    return match.end()


def _expect(raw: bytes, at: int, mark: bytes) -> int:
    """The beginning of what follows a mark and white space."""
    if raw[at : at + 1] != mark:
        raise ValueError(f"expected {mark.decode()} at byte {at}")
    return _skip_space(raw, at + 1)


def _opened(raw: bytes, span: Span, bracket: bytes) -> int:
    return _expect(raw, span.start, bracket)


def _next(raw: bytes, at: int, closing: bytes) -> int:
    """The beginning of the next member after a value, or the closing bracket."""
    at = _skip_space(raw, at)
    return at if raw[at : at + 1] == closing else _expect(raw, at, b",")
