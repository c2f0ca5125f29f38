"""The words of a text, as the drift guards compare them."""

from __future__ import annotations

import re
import unicodedata

# Scripts written without spaces: each character counts as a word (Han, kana, Thai, Lao, Myanmar, Khmer).
_UNSPACED = re.compile(
    "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"
)


def words(text: str) -> list[str]:
    """Split into runs of letters, marks and digits; in scripts without spaces, each character is a word."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in plain)
    return _UNSPACED.sub(r" \1 ", kept).split()
