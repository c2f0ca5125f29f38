"""What a body is checked for, and how the proxy's own field is cut out of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.serving.refusals import Refusal
from alignpro.serving.request_body import Wishes, parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SPACES = st.text(" \t\r\n", max_size=2)


@settings(max_examples=30)
@given(
    members=st.lists(
        st.tuples(st.text(max_size=8).filter(lambda name: name not in ("model", "stream", "user", "prompt")), VALUES)
    ),
    places=st.lists(st.integers(0, 8), max_size=2),
    space=SPACES,
    escaped=st.booleans(),
)
def test_the_field_is_cut_out_and_all_else_stays(
    members: list[tuple[str, Any]], places: list[int], space: str, escaped: bool
) -> None:
    def written(each: list[tuple[str, Any]]) -> str:
        pairs = (f"{json.dumps(name, ensure_ascii=escaped)}{space}:{space}{json.dumps(value)}" for name, value in each)
        return f"{space}{{{space}{f'{space},{space}'.join(pairs)}{space}}}{space}"

    members = [member for member in members if member[0] != "alignpro"]
    with_field = list(members)
    for place in places:
        with_field.insert(place, ("alignpro", {"opt_out": True}))
    text = written(with_field).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return  # a lone surrogate that was not escaped
    document = parse(text, "completions")
    assert document.wishes == Wishes(opt_out=bool(places))
    kept = document.raw.decode()
    assert json.loads(kept) == document.body == dict(members)
    if not places:
        assert document.raw == text
    elif members and not space:
        assert kept == written(members)


@pytest.mark.parametrize("text", ['{"alignpro":{}}', ' { "alignpro" : {} } ', '{"alignpro":{},"alignpro":{"run":"a"}}'])
def test_a_body_of_nothing_else_becomes_empty(text: str) -> None:
    assert json.loads(parse(text.encode(), "completions").raw) == {}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"model": "m"} x', "invalid_json", None),
        (b'{"messages": [NaN]}', "invalid_json", None),
        (b'{"x": -Infinity}', "invalid_json", None),
        (b'{"x": ' + b"9" * 5000 + b"}", "invalid_json", None),
        (b'{"x": ' + b"[" * 100_000, "invalid_json", None),
        (b"[1]", "invalid_json", None),
        (b"null", "invalid_json", None),
        (b'{"x": "\xff"}', "invalid_utf8", None),
        (b'\xef\xbb\xbf{"x": 1}', "invalid_json", None),
        ('{"x": 1}'.encode("utf-16"), "invalid_utf8", None),
        (b"{}", "invalid_type", "messages"),
        (b'{"messages": {}}', "invalid_type", "messages"),
        (b'{"messages": []}', "empty_array", "messages"),
        (b'{"messages": ["hi"]}', "invalid_type", "messages[0]"),
        (b'{"messages": [{"role": "user"}, {"role": 1}]}', "invalid_type", "messages[1].role"),
        (b'{"messages": [{"role": "user"}], "model": 1}', "invalid_type", "model"),
        (b'{"messages": [{"role": "user"}], "stream": 1}', "invalid_type", "stream"),
        (b'{"messages": [{"role": "user"}], "user": []}', "invalid_type", "user"),
        (b'{"messages": [{"role": "user"}], "alignpro": 1}', "invalid_type", "alignpro"),
        (b'{"messages": [{"role": "user"}], "alignpro": {"runs": 1}}', "unknown_field", "alignpro"),
        (b'{"messages": [{"role": "user"}], "alignpro": {"run": 1}}', "invalid_type", "alignpro.run"),
        (b'{"messages": [{"role": "user"}], "alignpro": {"opt_out": 1}}', "invalid_type", "alignpro.opt_out"),
        (b'{"messages": [{"role": "user"}], "alignpro": {"return": []}}', "invalid_type", "alignpro.return"),
    ],
)
def test_a_bad_body_is_refused_by_name(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(Refusal) as refused:
        parse(body, "chat")
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, param)


def test_a_prompt_of_completions_has_a_type() -> None:
    with pytest.raises(Refusal, match="prompt: expected a string or an array"):
        parse(b'{"prompt": 1}', "completions")
