"""Drift guards on what a rewrite must keep word by word: the numbers, names and code of the prompt.

Each measure is the share of the prompt's pieces that the rewrite has too, in [0, 1]; without pieces it is 1. How often a piece
occurs does not matter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from alignpro.rewards.words import words

_NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?\d+(?:[.,]\d+)*")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_WORD = re.compile(r"(?<![^\W_])[^\W\d_][^\W_]*(?:[-'’][^\W_]+)*")
"""A run of letters and digits that begins with a letter, with what hyphens and apostrophes join to it."""
_OPENING = " \t\"'“”‘’«»„([*#>-"
"""What may stand between the end of a sentence and the first word of the next."""
_ENDS = "\n.!?:;…"
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_URL = re.compile(r"https?://[^\s<>\"'`]+[^\s<>\"'`.,;:!?)\]}]")
_IDENTIFIER = re.compile(r"\w*[^\W_]_+[^\W_]\w*")


def numbers_kept(originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
    """Share of the numbers in digits that the rewrite has in digits, with their signs.

    Commas between thousands do not count, a single other one is a decimal point, and several separate numbers.
    """
    return _shares(originals, rewrites, _numbers_found)


def names_kept(originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
    """Share of the names that the rewrite has, in whatever case.

    A name is a word with a capital inside it, or with a capital at its beginning that does not begin a sentence; after its
    first letter it may have digits. In a text in which most words have capitals, and in scripts without them, there are no names.
    """
    return _shares(originals, rewrites, _names_found)


def code_kept(originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
    """Share of the pieces of code that the rewrite has, apart from white space.

    Pieces are blocks between ```` ``` ````, spans between backticks, URLs, and identifiers with an underscore inside.
    """
    return _shares(originals, rewrites, _code_found)


def _shares(originals: Sequence[str], rewrites: Sequence[str], found: Callable[[str, str], list[bool]]) -> list[float]:
    pairs = [found(x, x2) for x, x2 in zip(originals, rewrites, strict=True)]
    return [sum(each) / len(each) if each else 1.0 for each in pairs]


def _numbers_found(original: str, rewrite: str) -> list[bool]:
    there = _numbers(rewrite)
    return [each in there for each in _numbers(original)]


def _numbers(text: str) -> set[str]:
    digits = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return {number for found in _NUMBER.findall(digits) for number in _values(found.replace("−", "-"))}


def _values(found: str) -> list[str]:
    """The numbers that digits with points and commas are."""
    sign, plain = ("-", found[1:]) if found.startswith("-") else ("", found)
    if _THOUSANDS.fullmatch(plain):
        return [sign + plain.replace(",", "")]
    first, *others = plain.split(",")
    if len(others) == 1 and "." not in plain:
        return [f"{sign}{first}.{others[0]}"]
    return [sign + first, *others]


def _names_found(original: str, rewrite: str) -> list[bool]:
    there = set(words(_without_marks(rewrite)))
    return [set(words(name)) <= there for name in _names(_without_marks(original))]


def _without_marks(text: str) -> str:
    """The text in NFKC, in which an accent is part of its letter, without the marks that have no such letter."""
    plain = unicodedata.normalize("NFKC", text)
    return plain if plain.isascii() else "".join(c for c in plain if unicodedata.category(c)[0] != "M")


def _names(text: str) -> set[str]:
    found = [(match[0].removesuffix("'s").removesuffix("’s"), match.start()) for match in _WORD.finditer(text)]
    long = [(word, start) for word, start in found if len(word) > 1 and not word.startswith(("I'", "I’"))]
    capital = [(word, start) for word, start in long if any(c.isupper() for c in word)]
    if 2 * len(capital) > len(long) > 2:
        return set()
    return {word for word, start in capital if _is_name(word, text[max(0, start - 20) : start])}


def _is_name(word: str, before: str) -> bool:
    before = before.rstrip(_OPENING)
    return any(c.isupper() for c in word[1:]) or (before != "" and before[-1] not in _ENDS)


def _code_found(original: str, rewrite: str) -> list[bool]:
    there = _without_space(rewrite)
    return [_without_space(piece) in there for piece in _code(original)]


def _code(text: str) -> set[str]:
    pieces: set[str] = set()
    for pattern in (_FENCED, _INLINE, _URL, _IDENTIFIER):
        pieces |= {match[1] if pattern.groups else match[0] for match in pattern.finditer(text)}
        text = pattern.sub(" ", text)
    return {piece for piece in pieces if piece.strip()}


def _without_space(text: str) -> str:
    return "".join(text.split())
