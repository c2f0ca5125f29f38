"""The JSON that is sent, and the strict reading of what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.config import EndpointConfig
from alignpro.endpoints.types import Answer, Query, Sampling, Usage
from alignpro.endpoints.wire import (
    ErrorInsideError,
    MalformedAnswerError,
    draw_keys,
    max_tokens_of,
    outcome_of,
    read_answer,
    request_body,
    upper_bound,
    with_draws,
)
from alignpro.errors import EndpointError

SAMPLING = Sampling(max_tokens=8)


def config(**changes: Any) -> EndpointConfig:
    return EndpointConfig(base_url="https://api.example/v1/", model="m", **changes)


def query(sampling: Sampling = SAMPLING, text: str = "hello") -> Query:
    return Query((("system", "be brief"), ("user", text)), sampling, 77, (5, 6))


def sent(sampling: Sampling = SAMPLING, **changes: Any) -> dict[str, Any]:
    loaded = json.loads(with_draws(request_body(config(**changes), query(sampling)), 2, 77))
    assert isinstance(loaded, dict)
    return loaded


def test_only_what_is_set_is_sent() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    base = {"model": "m", "messages": messages, "max_tokens": 8, "n": 2, "seed": 77}
    assert sent() == base | {"temperature": 1.0, "top_p": 1.0}
    assert sent(Sampling(8, 0.0, top_k=5)) == base | {"temperature": 0.0}
    everything = Sampling(8, 0.5, 0.9, 40, 0.05, ("\n", "end"))
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "stop": ["\n", "end"]}
    assert sent(everything) == base | more
    completions = sent(api="completions")
    assert completions["prompt"] == "hello" and "messages" not in completions


def test_extra_fields_go_over_the_others_and_null_takes_one_out() -> None:
    body = sent(extra_body={"top_p": None, "reasoning_effort": "low", "max_completion_tokens": 900})
    assert "top_p" not in body and "max_tokens" not in body
    assert body["reasoning_effort"] == "low" and body["max_completion_tokens"] == 900
    assert max_tokens_of(config(extra_body={"max_completion_tokens": 900}), query()) == 900


def test_draws_are_keyed_by_all_that_is_sent_but_n_and_seed() -> None:
    def keys(sampling: Sampling = SAMPLING, **changes: Any) -> list[Any]:
        return draw_keys(config(**changes), query(sampling), request_body(config(**changes), query(sampling)))

    first = keys()
    assert [key.draw for key in first] == [5, 6] and first[0].base_url == "https://api.example/v1"
    assert keys(timeout_seconds=5, max_retries=1, api_key_env="K", n=False, proxy="http://p") == first
    assert [key.draw for key in keys(Sampling(8, 0.0))] == [0, 0]
    for other in (keys(Sampling(9)), keys(extra_body={"logit_bias": {"1": 5}}), keys(api="completions")):
        assert other[0] != first[0]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_bound_counts_every_byte(text: str) -> None:
    body = request_body(config(), query(text=text))
    assert json.loads(body)["messages"][1]["content"] == text
    bound = upper_bound(config(), query(text=text), body, 3)
    assert bound.input >= len(text.encode()) + 512 and bound.output == 24


def test_a_ligature_that_normalises_to_eighteen_letters_counts_as_them() -> None:
    def bound(text: str) -> int:
        return upper_bound(config(), query(text=text), request_body(config(), query(text=text)), 1).input

    assert bound("\ufdfa") - bound("") == 33


def test_half_of_a_surrogate_pair_is_an_error() -> None:
    with pytest.raises(EndpointError, match="surrogate"):
        request_body(config(), query(text="\ud800"))


def choice(index: int = 0, content: Any = "text", finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"index": index, "finish_reason": finish_reason, "message": {"content": content} | message}


def answer(*choices: Any, **more: Any) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return json.dumps(
        {"choices": list(choices), "usage": usage, "model": "m-1", "system_fingerprint": "f"} | more
    ).encode()


def test_choices_come_in_the_order_of_their_index() -> None:
    received = read_answer(answer(choice(1, "b"), choice(0, "a", "length", reasoning_content="hm")), "chat", 2)
    assert received.answers == [Answer("a", "length", "hm", "m-1", "f"), Answer("b", "stop", "", "m-1", "f")]
    assert received.usage == Usage(3, 4) and received.choices == 2 and not received.problem
    text = read_answer(answer({"text": "plain", "finish_reason": "eos_token"}), "completions", 1)
    assert text.answers == [Answer("plain", "stop", "", "m-1", "f")]


@pytest.mark.parametrize(
    "one, expected",
    [
        (choice(content=None), Answer("", "stop", "", "m-1", "f")),  # of a turn that ends at once
        (
            choice(content=[{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]),
            Answer("ab", "stop", "", "m-1", "f"),
        ),
        (choice(content=[{"type": "image"}]), None),
        (choice(content=None, tool_calls=[{"id": "1"}]), None),
        (choice(content=5), None),
        (choice(content=["a"]), None),
        (choice(finish_reason=None), None),
        (choice(finish_reason="abort"), None),
        ("text", None),
        ({"finish_reason": "stop", "message": "text"}, None),
        ({"finish_reason": "stop"}, None),
        (choice(content=None, finish_reason="tool_calls"), None),
        (
            choice(content=None, finish_reason="length", reasoning="on and on"),
            Answer("", "length", "on and on", "m-1", "f"),
        ),
        (choice(content=None, refusal="I will not"), Answer("I will not", "stop", "", "m-1", "f")),
        (choice("", "half of it", "content_filter"), Answer("", "filtered", "", "m-1", "f")),
        (choice(content=""), Answer("", "stop", "", "m-1", "f")),
    ],
)
def test_a_choice_is_an_answer_only_if_it_holds_text(one: Any, expected: Answer | None) -> None:
    received = read_answer(answer(one), "chat", 1)
    assert received.answers == [expected] and bool(received.problem) == (expected is None)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "many",
        {},
        {"prompt_tokens": 3},
        {"prompt_tokens": float("nan"), "completion_tokens": 4},
        {"prompt_tokens": float("inf"), "completion_tokens": 4},
        {"prompt_tokens": -1, "completion_tokens": 4},
        {"prompt_tokens": 1.5, "completion_tokens": 4},
        {"prompt_tokens": "3", "completion_tokens": 4},
        {"prompt_tokens": True, "completion_tokens": 4},
        {"prompt_tokens": 1 << 60, "completion_tokens": 4},
    ],
)
def test_usage_that_cannot_be_is_unknown_and_the_answer_is_kept(usage: Any) -> None:
    received = read_answer(answer(choice(), usage=usage), "chat", 1)
    assert received.usage is None and received.answers[0] is not None


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"3", b"{}", b'{"choices": []}', b'{"choices": {}}', b"\xff"]
)
def test_what_has_no_choices_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        read_answer(body, "chat", 1)


def test_deeply_nested_json_is_malformed() -> None:
    with pytest.raises(MalformedAnswerError):
        read_answer(b"[" * 200_000, "chat", 1)


def test_an_error_instead_of_choices_has_its_own_status() -> None:
    for code, status in ((429, 429), ("busy", 500), (None, 500), (200, 500)):
        with pytest.raises(ErrorInsideError) as raised:
            read_answer(json.dumps({"error": {"message": "no", "code": code}}).encode(), "chat", 1)
        assert raised.value.status == status


def test_fewer_or_more_choices_than_asked_are_told() -> None:
    received = read_answer(answer(choice()), "chat", 3)
    assert [one is None for one in received.answers] == [False, True, True] and received.choices == 1
    assert read_answer(answer(choice(0), choice(1)), "chat", 1).choices == 2


FIELDS = ["choices", "message", "content", "finish_reason", "usage", "error", "index", "text", "prompt_tokens"]
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@given(DOCUMENTS)
def test_no_json_breaks_it(document: Any) -> None:
    body = json.dumps(document).encode()
    for api in ("chat", "completions"):
        try:
            assert len(read_answer(body, api, 2).answers) == 2
        except (MalformedAnswerError, ErrorInsideError) as error:
            assert len(str(error)) < 400
    outcome_of(400, body)


@pytest.mark.parametrize(
    "status, error, outcome",
    [
        (400, {"code": "context_length_exceeded"}, "overflow"),
        (
            400,
            {"message": "the request exceeds the available context size (512 tokens), try increasing it"},
            "overflow",
        ),
        (
            422,
            {"message": "`inputs` must have less than 1024 tokens. Given: 2000", "error_type": "validation"},
            "overflow",
        ),
        (400, {"code": "content_filter"}, "filtered"),
        (400, {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}, "filtered"),
        (400, {"code": "invalid_value", "message": "temperature must be below 2"}, None),
        (500, {"code": "context_length_exceeded"}, None),
        (401, {"code": "content_filter"}, None),
    ],
)
def test_refusals_that_depend_on_the_text(status: int, error: dict[str, Any], outcome: str | None) -> None:
    assert outcome_of(status, json.dumps({"error": error}).encode()) == outcome
    assert outcome_of(status, json.dumps(error).encode()) == outcome
