"""The official client of OpenAI's API against the proxy, over real sockets: nothing of it is changed but the base URL."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from proxies import Proxy, Shouting, proxied
from pydantic import BaseModel
from upstream import DONE, EVENTS, WORDS, Upstream, chat_answer

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(proxy: Proxy) -> Iterator[OpenAI]:
    with OpenAI(base_url=proxy.url, api_key="sk-client", max_retries=0, timeout=20) as client:
        yield client


def _chat(client: OpenAI, model: str = "m", **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=MESSAGES, **more)


def test_a_chat_a_stream_and_the_models(client: OpenAI) -> None:
    answer = _chat(client)
    assert answer.choices[0].message.content == "stone river"
    assert answer.usage.completion_tokens == 2
    assert answer._request_id.startswith("req_")
    with _chat(client, stream=True) as stream:
        words = [event.choices[0].delta.content for event in stream]
    assert words == [f"{word} " for word in WORDS]
    assert [model.id for model in client.models.list()] == ["m"]
    raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    assert raw.headers["x-alignpro-rewrite"] == "skipped:no_run"
    assert client.completions.create(model="m", prompt="hello").id == "chatcmpl-1"
    with client.completions.with_streaming_response.create(model="m", prompt="hello", stream=True) as streamed:
        assert streamed.read() == b"".join(EVENTS) + DONE


def test_tools_images_and_unknown_fields(client: OpenAI, upstream: Upstream) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = (
        _chat(client, tools=[tool], response_format={"type": "json_object"}, logprobs=True)
        .choices[0]
        .message.tool_calls[0]
    )
    assert (call.function.name, call.function.arguments) == ("weather", '{"city":"Rome"}')
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + 300_000 * "A"}}
    content: Any = [{"type": "text", "text": "what is it?"}, image]
    client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": content}],
        extra_body={"top_k": 3, "alignpro": {"opt_out": True}},
    )
    received = upstream.received[-1].body
    assert b'"top_k":3' in received
    assert received.count(b"A") == 300_000
    assert b"alignpro" not in received


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("limited", openai.RateLimitError),
        ("unknown", openai.NotFoundError),
        ("broken", openai.InternalServerError),
        ("dies-before", openai.InternalServerError),
        ("dies-in-body", openai.APIConnectionError),
    ],
)
def test_errors(client: OpenAI, model: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        _chat(client, model)


def test_an_error_of_the_proxy_and_one_in_a_stream(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="expected at least one message") as refused:
        client.chat.completions.create(model="m", messages=[])
    assert (refused.value.code, refused.value.param) == ("empty_array", "messages")
    words = []
    with pytest.raises(openai.APIError, match="broke off"):
        for event in _chat(client, "dies-in-stream", stream=True):
            words.append(event.choices[0].delta.content)
    assert words == [f"{word} " for word in WORDS[:2]]


def test_a_timeout_and_a_closed_stream_cancel_the_target(client: OpenAI, upstream: Upstream) -> None:
    with pytest.raises(openai.APITimeoutError):
        _chat(client.with_options(timeout=0.2), "never")
    upstream.wait_for(lambda: upstream.cancelled == 1)
    stream = _chat(client, "stalls", stream=True)
    assert next(iter(stream)).choices[0].delta.content == "stone "
    stream.close()
    upstream.wait_for(lambda: upstream.cancelled == 2)


def test_events_come_as_the_target_sends_them(client: OpenAI, upstream: Upstream) -> None:
    upstream.pause = 0.1
    moments = [time.monotonic() for _ in _chat(client, stream=True)]
    assert moments[-1] - moments[0] > 0.25


class Place(BaseModel):
    """What an answer and the arguments of a tool are parsed into."""

    city: str


def test_a_program_that_knows_only_its_environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", proxy.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-client")

    async def stream() -> list[str]:
        async with AsyncOpenAI() as client:
            events = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            return [event.choices[0].delta.content or "" async for event in events]

    assert asyncio.run(stream()) == [f"{word} " for word in WORDS]
    with OpenAI() as client:
        assert _chat(client).choices[0].message.content == "stone river"


def test_answers_and_tools_that_the_client_parses(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = openai.pydantic_function_tool(Place, name="weather")
    parsed = client.chat.completions.parse(model="m", messages=MESSAGES, tools=[tool]).choices[0].message
    assert parsed.tool_calls is not None
    assert parsed.tool_calls[0].function.parsed_arguments == Place(city="Rome")
    monkeypatch.setattr("upstream.chat_answer", lambda *_, **__: chat_answer('{"city": "Oslo"}'))
    answer = client.chat.completions.parse(model="m", messages=MESSAGES, response_format=Place)
    assert answer.choices[0].message.parsed == Place(city="Oslo")


def test_the_clients_own_streams(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    named = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
    monkeypatch.setattr("upstream.EVENTS", [event.replace(b"data: {", named) for event in EVENTS])
    with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
    assert deltas == [f"{word} " for word in WORDS]


def test_a_rewrite_that_the_client_asks_for(upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting()) as proxy, OpenAI(base_url=proxy.url, api_key="sk") as client:
        answer = _chat(client, extra_body={"alignpro": {"run": "quiet", "return": "body"}})
        assert answer.model_extra["alignpro"] | {"ms": 0} == {
            "rewrite": "HELLO",
            "applied": True,
            "skipped": None,
            "run": "quiet",
            "ms": 0,
        }
        assert json.loads(upstream.received[-1].body)["messages"][0]["content"] == "HELLO"
        raw = client.chat.completions.with_raw_response.create(
            model="m", messages=MESSAGES, extra_headers={"x-alignpro-opt-out": "1"}
        )
        assert raw.headers["x-alignpro-rewrite"] == "skipped:opt_out"
        assert json.loads(upstream.received[-1].body)["messages"][0]["content"] == "hello"
