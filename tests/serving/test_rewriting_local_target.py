"""A model in this process behind the API of a server: its answers, its streams, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting_runs import ENGINE
from tiny_models import tiny_language_model

from alignpro.config.serving_rewriting import LocalTargetConfig
from alignpro.data import Message
from alignpro.engine import Engine, SamplingParams, derive_seed
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.serving.contract import TargetFailure, TargetRequest
from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.local_target import LocalServedTarget
from alignpro.serving.text_stream import TextStream

CHAT: dict[str, Any] = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 1}
COMPLETION: dict[str, Any] = {"model": "big", "prompt": "hi", "max_tokens": 12, "seed": 1}


def with_target(
    model: LanguageModel, use: Callable[[LocalServedTarget, EngineThread], Awaitable[Any]], **config: Any
) -> Any:
    async def main() -> Any:
        engine = EngineThread({"target": model}, ENGINE)
        template = ChatTemplate(model.tokenizer, stop_token_ids=model.end_token_ids)
        try:
            target = LocalServedTarget(model, engine, template, "big", LocalTargetConfig(**config))
            return await use(target, engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def request(body: Any, path: str = "/chat/completions", method: str = "POST") -> TargetRequest:
    return TargetRequest(method, path, (), body if isinstance(body, bytes) else json.dumps(body).encode())


async def read(target: LocalServedTarget, asked: TargetRequest) -> tuple[int, Any]:
    """The status, and the JSON or the events of a stream."""
    response = await target.send(asked)
    content = b"".join([chunk async for chunk in response.chunks()])
    await response.close()
    headers = dict(response.headers)
    if headers[b"content-type"] == b"application/json":
        assert headers[b"content-length"] == str(len(content)).encode()
        return response.status, json.loads(content)
    assert headers[b"content-type"].startswith(b"text/event-stream")
    events = content.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return response.status, [event[6:] for event in events]


def send(model: LanguageModel, body: Any, path: str = "/chat/completions", method: str = "POST", **config: Any) -> Any:
    return with_target(model, lambda target, _: read(target, request(body, path, method)), **config)


def drawn(model: LanguageModel, *, n: int = 1, **params: Any) -> list[str]:
    """What the engine gives for the chat's prompt."""
    template = ChatTemplate(model.tokenizer, stop_token_ids=model.end_token_ids)
    settings = SamplingParams(max_tokens=12, n=n, stop_token_ids=template.stop_token_ids, **params)
    (group,) = Engine({"m": model}).generate("m", [template.encode([Message("user", "hi")])], settings, [1])
    return [template.decode(each.text_tokens) for each in group]


def test_answers_are_those_of_the_engine(llama: LanguageModel) -> None:
    status, answer = send(llama, CHAT | {"n": 3, "temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01})
    assert status == 200
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == drawn(llama, n=3, temperature=0.9, top_p=0.9, top_k=20, min_p=0.01)
    assert len(set(texts)) == 3
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 36
    assert (answer["object"], answer["model"], answer["id"][:9]) == ("chat.completion", "big", "chatcmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}


def test_without_n_the_seed_is_that_of_the_draw(llama: LanguageModel) -> None:
    _, several = send(llama, CHAT | {"n": 2})
    singles = [send(llama, CHAT | {"seed": derive_seed(1, k)})[1] for k in range(2)]
    assert [each["choices"][0]["message"] for each in singles] == [each["message"] for each in several["choices"]]


def test_greedy_needs_no_seed_and_samples_without_one_differ(llama: LanguageModel) -> None:
    body = {name: value for name, value in CHAT.items() if name != "seed"}
    assert (
        send(llama, body | {"temperature": 0})[1]["choices"][0]["message"]["content"]
        == drawn(llama, temperature=0.0)[0]
    )

    assert (
        send(llama, CHAT | {"temperature": 1e-300})[1]["choices"][0]["message"]["content"]
        == drawn(llama, temperature=0.0)[0]
    )

    async def several(target: LocalServedTarget, _: EngineThread) -> set[str]:
        answers = [await read(target, request(body | {"temperature": 2})) for _ in range(3)]
        return {answer["choices"][0]["message"]["content"] for _, answer in answers}

    assert len(with_target(llama, several)) == 3


def streamed(events: list[str], n: int) -> tuple[list[str], list[str | None]]:
    """The texts and the reasons of their ends."""
    assert events[-1] == "[DONE]"
    texts, reasons = [""] * n, [None] * n
    for event in events[:-1]:
        for choice in json.loads(event)["choices"]:
            assert reasons[choice["index"]] is None, "something comes after the end"
            texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    return texts, reasons


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_a_stream_is_the_answer_in_pieces(architecture: str, path: str) -> None:
    model = tiny_language_model(architecture)
    base = (CHAT if path == "/chat/completions" else COMPLETION) | {"n": 4, "temperature": 1.5, "max_tokens": 24}

    async def compare(target: LocalServedTarget, _: EngineThread) -> None:
        for seed in range(2):
            _, plain = await read(target, request(base | {"seed": seed}, path))
            whole = [
                choice["message"]["content"] if "message" in choice else choice["text"] for choice in plain["choices"]
            ]
            stops = [next((text[3:5] for text in whole if len(text) > 6), "zz"), "qq"]
            body = base | {"seed": seed, "stop": stops}
            _, answer = await read(target, request(body, path))
            options = {"stream": True, "stream_options": {"include_usage": True}}
            _, events = await read(target, request(body | options, path))
            *chunks, last, done = events
            assert json.loads(last)["usage"] == answer["usage"]
            texts, reasons = streamed([*chunks, done], 4)
            assert reasons == [choice["finish_reason"] for choice in answer["choices"]]
            assert texts == [
                choice["message"]["content"] if "message" in choice else choice["text"] for choice in answer["choices"]
            ]
            assert not any(stop in text for text in texts for stop in stops)
            assert len(chunks) >= sum(map(bool, texts)) + 4

    with_target(model, compare)


def test_nothing_that_was_streamed_is_taken_back() -> None:
    """Not a stop text's beginning, half a character, or reasoning."""
    parts = ["a", "b<", "stop", "\ufffd", "é", "<", "st"]
    stream = TextStream(lambda tokens: "".join(parts[: len(tokens)]).replace("\ufffdé", "é"), ["<stop>"])
    pieces = [stream.push(range(n)) for n in range(1, len(parts) + 1)]
    assert pieces == ["a", "b", "", "", "<stopé", "", ""]
    assert stream.finish("ab<stopé<st") == "<st"
    thinking = ["<th", "<think>", "", "", "answer"]
    stream = TextStream(lambda tokens: thinking[len(tokens) - 1], [])
    assert [stream.push(range(n)) for n in range(1, 6)] == ["", "", "", "", "answer"]


def test_messages_may_be_parts_and_echo_what_clients_got(llama: LanguageModel) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "more"}]},
    ]
    plain = [("system", "be\nkind"), ("user", "hi"), ("assistant", "yes"), ("user", "more")]
    first = send(llama, CHAT | {"messages": messages})
    second = send(llama, CHAT | {"messages": [{"role": role, "content": text} for role, text in plain]})
    assert first[1]["choices"] == second[1]["choices"]


def test_fields_that_ask_for_nothing_are_no_problem(llama: LanguageModel) -> None:
    nothing = {
        "tools": [],
        "response_format": {"type": "text"},
        "logit_bias": {},
        "presence_penalty": 0.0,
        "user": "me",
    }
    nothing |= {"logprobs": False, "audio": None, "top_k": -1, "stop": None, "stream": False, "metadata": {}}
    assert send(llama, CHAT | nothing)[1]["choices"] == send(llama, CHAT)[1]["choices"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"store": True}, "store"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"prompt": "hi"}, "prompt"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"n": 0}, "n"),
        ({"n": 999}, "n"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1}, "min_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"stop": ["a", "\ud800"]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
        ({"max_tokens": 127}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change: dict[str, Any], param: str, echo: Any) -> None:
    status, answer = echo(CHAT | change)
    assert status == 400
    assert answer["error"]["param"] == param
    assert param in answer["error"]["message"] or "maximum context length" in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def echo(llama: LanguageModel) -> Any:
    """Return ``echo(body, path, method)``, which asks one target that lives through the module."""
    loop = asyncio.new_event_loop()
    template = ChatTemplate(llama.tokenizer, stop_token_ids=llama.end_token_ids)

    async def make() -> tuple[LocalServedTarget, EngineThread]:
        engine = EngineThread({"target": llama}, ENGINE)
        return LocalServedTarget(llama, engine, template, "big", LocalTargetConfig()), engine

    target, engine = loop.run_until_complete(make())
    yield lambda body, *where: loop.run_until_complete(read(target, request(body, *where)))
    loop.run_until_complete(engine.close())
    loop.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_by_name(change: dict[str, Any], param: str, echo: Any) -> None:
    status, answer = echo(COMPLETION | change, "/completions")
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("prompt", [["a", "b"], [1, 2], [], "", None])
def test_a_completion_has_one_prompt(prompt: Any, echo: Any) -> None:
    status, answer = echo(COMPLETION | {"prompt": prompt}, "/completions")
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_a_completion_continues_its_prompt(llama: LanguageModel, echo: Any) -> None:
    status, answer = echo(COMPLETION | {"prompt": ["hi"], "temperature": 0}, "/completions")
    tokens = llama.tokenizer("hi")["input_ids"]
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=llama.end_token_ids)
    ((completion,),) = Engine({"m": llama}).generate("m", [tokens], params)
    text = llama.tokenizer.decode(completion.text_tokens, skip_special_tokens=True)
    assert (status, answer["object"], answer["choices"][0]["text"]) == (200, "text_completion", text)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 5000, b'"x"'])
def test_what_is_no_json_object_is_refused(body: bytes, echo: Any) -> None:
    status, answer = echo(body)
    assert status == 400
    assert answer["error"]["message"].startswith("the body is no JSON")


Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "name"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop"]
FIELDS += ["logprobs", "top_logprobs"]


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from([*FIELDS, "stream", "tools", "x"]), Values, max_size=3), st.booleans())
def test_any_json_is_answered_or_refused(echo: Any, change: dict[str, Any], chat: bool) -> None:
    base = CHAT if chat else COMPLETION
    body = json.dumps(base | {"max_tokens": 1} | change).encode("utf-8", "surrogatepass")
    status, answer = echo(body, "/chat/completions" if chat else "/completions")
    assert status in (200, 400, 404)
    assert status == 200 or answer["error"]["message"]


def test_models_and_paths(echo: Any) -> None:
    status, listed = echo(b"", "/models", "GET")
    assert (status, [each["id"] for each in listed["data"]]) == (200, ["big"])
    assert echo(b"", "/models/big?x=1", "GET") == (200, listed["data"][0])
    assert echo(b"", "/models/%62ig", "GET")[0] == 200
    status, answer = echo(b"", "/models/other", "GET")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer = echo(b"{}", "/embeddings")
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert "/v1/embeddings is not served: /v1/chat/completions" in answer["error"]["message"]
    status, answer = echo(b"", "/chat/completions", "GET")
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    status, answer = echo(CHAT | {"model": "other"})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")


def test_a_prompt_that_does_not_fit_is_named_as_servers_do(echo: Any) -> None:
    status, answer = echo(CHAT | {"messages": [{"role": "user", "content": "x" * 130}]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_without_a_limit_a_response_has_the_room_of_the_context(llama: LanguageModel) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    _, limited = send(llama, body, max_tokens=5)
    _, free = send(llama, body)
    assert limited["usage"]["completion_tokens"] <= 5
    assert free["usage"]["total_tokens"] <= 128


def test_overload_is_refused_with_429(llama: LanguageModel) -> None:
    async def use(target: LocalServedTarget, _: EngineThread) -> None:
        streams = [await target.send(request(CHAT | {"stream": True, "max_tokens": 100})) for _ in range(2)]
        response = await target.send(request(CHAT))
        assert (response.status, dict(response.headers)[b"retry-after"]) == (429, b"1")
        for each in streams:
            await each.close()
        await asyncio.sleep(0)
        assert (await target.send(request(CHAT))).status == 200

    with_target(llama, use, max_waiting=2)


def test_cancelled_requests_and_closed_streams_end_at_once(llama: LanguageModel) -> None:
    long = CHAT | {"max_tokens": 110, "temperature": 0, "messages": [{"role": "user", "content": "y"}]}

    async def use(target: LocalServedTarget, engine: EngineThread) -> None:
        task = asyncio.create_task(target.send(request(long)))
        await asyncio.sleep(0)
        stream = await target.send(request(long | {"stream": True}))
        pieces = stream.chunks()
        await anext(pieces)
        assert engine.waiting("target") == 2
        task.cancel()
        await stream.close()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.waiting("target") == 0
        await engine.complete("target", [5], SamplingParams(max_tokens=2))
        assert not engine._pending

    with_target(llama, use)


def test_a_computation_that_fails_is_a_500_or_an_error_in_the_stream() -> None:
    model = tiny_language_model("llama")
    error: list[Exception] = []

    def check(*_: object) -> None:
        if error:
            raise error[0]

    model.causal.get_input_embeddings().register_forward_pre_hook(check)

    async def use(target: LocalServedTarget, _: EngineThread) -> None:
        error.append(ValueError("poison"))
        status, answer = await read(target, request(CHAT))
        assert (status, answer["error"]["type"]) == (500, "server_error")
        _, events = await read(target, request(CHAT | {"stream": True}))
        assert "poison" in json.loads(events[-1])["error"]["message"]
        error[0] = torch.AcceleratorError("CUDA error")
        with pytest.raises(TargetFailure, match="CUDA error"):
            await read(target, request(CHAT))
        with pytest.raises(TargetFailure, match="CUDA error"):
            await target.send(request(CHAT))
        assert "CUDA error" in str(await target.reachable())

    with_target(model, use)
