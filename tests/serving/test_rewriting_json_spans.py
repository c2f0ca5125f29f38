"""The scanner finds the bytes of every value that `json.loads` reads, and an edit changes those alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.serving.json_spans import Edit, Span, edited, elements, members, root

Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
Spaces = st.text(" \t\n\r", max_size=2)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """JSON with white space anywhere, with and without escapes, and with repeated keys."""

    def write(value: Any) -> str:
        space = draw(Spaces)
        if isinstance(value, dict):
            pairs = [(key, each) for key, each in value.items()]
            if pairs and draw(st.booleans()):
                pairs.insert(0, (pairs[-1][0], draw(Values)))
            inner = ",".join(f"{space}{text(key)}{space}:{write(each)}" for key, each in pairs)
            return f"{space}{{{inner}{space}}}{space}"
        if isinstance(value, list):
            return f"{space}[{','.join(map(write, value)) or space}]{space}"
        return f"{space}{text(value) if isinstance(value, str) else json.dumps(value)}{space}"

    def text(value: str) -> str:
        if draw(st.booleans()):
            return json.dumps(value)
        return json.dumps(value, ensure_ascii=False)

    return write(draw(Values)).encode()


def check(raw: bytes, span: Span, value: Any) -> None:
    assert repr(json.loads(span.of(raw))) == repr(value)  # NaN is not equal to itself
    assert raw[span.start : span.end].strip() == span.of(raw)
    if isinstance(value, dict):
        found = members(raw, span)
        assert found.keys() == value.keys()
        for key, inner in found.items():
            check(raw, inner, value[key])
    elif isinstance(value, list):
        for inner, each in zip(elements(raw, span), value, strict=True):
            check(raw, inner, each)


@settings(max_examples=50)
@given(documents())
def test_every_value_is_found(raw: bytes) -> None:
    check(raw, root(raw), json.loads(raw))


@settings(max_examples=50)
@given(documents(), st.binary(max_size=3), st.integers(0), st.integers(0, 20))
def test_bytes_that_are_no_json_raise_nothing_but_value_errors(raw: bytes, put: bytes, at: int, cut: int) -> None:
    at %= len(raw) + 1
    broken = raw[:at] + put + raw[at + cut :]
    try:
        span = root(broken)
        members(broken, span)
    except ValueError:
        pass


def test_an_edit_changes_only_its_bytes() -> None:
    raw = b' { "n": 1.50e+00 , "a" : "x\\u0041" , "a":"last" }\n'
    assert edited(raw, [Edit(members(raw, root(raw))["a"], b'"new"')]) == raw.replace(b'"last"', b'"new"')


def test_a_byte_order_mark_is_no_part_of_the_document() -> None:
    assert root(b"\xef\xbb\xbf [1]") == Span(4, 7)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_another_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match="not in UTF-8"):
        root('{"a": 1}'.encode(encoding))


def test_nesting_has_no_limit_of_its_own() -> None:
    raw = b"[" * 100_000 + b"]" * 100_000
    assert root(raw) == Span(0, len(raw))
    assert elements(raw, root(raw)) == [Span(1, len(raw) - 1)]
