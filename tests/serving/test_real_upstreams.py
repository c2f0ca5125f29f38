"""The proxy in front of servers that are not ours, with SmolLM2: what comes through is what they say without it.

What a server takes or refuses is its own affair: an answer, or an error with its status, is compared with the one that the
server gives when it is asked directly.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, OpenAI
from proxies import Proxy, proxied
from real_servers import UPSTREAMS, RealServer

pytestmark = [pytest.mark.slow, pytest.mark.server]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module", params=UPSTREAMS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with UPSTREAMS[request.param](tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server: RealServer) -> Iterator[Proxy]:
    with proxied(server.url) as served:
        yield served


@contextlib.contextmanager
def clients(server: RealServer, proxy: Proxy) -> Iterator[tuple[OpenAI, OpenAI]]:
    """The official client, directly and through the proxy."""
    common: dict[str, Any] = {"api_key": "unused", "max_retries": 0, "timeout": 120}
    with OpenAI(base_url=server.url, **common) as direct, OpenAI(base_url=proxy.url, **common) as through:
        yield direct, through


def chat(server: RealServer, text: str = "Name three colours.", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 24, **more}


def test_answers_and_streams_are_the_servers(server: RealServer, proxy: Proxy) -> None:
    with clients(server, proxy) as (direct, through):
        expected = direct.chat.completions.create(**chat(server)).choices[0]
        answer = through.chat.completions.with_raw_response.create(**chat(server))
        assert answer.headers["x-alignpro-rewrite"] == "skipped:no_run"
        found = answer.parse().choices[0]
        assert found.message.content == expected.message.content != ""
        assert found.finish_reason == expected.finish_reason
        stream = through.chat.completions.create(**chat(server, stream=True))
        events = [event for event in stream if event.choices]
        assert "".join(event.choices[0].delta.content or "" for event in events) == expected.message.content
        assert len(events) > 3


def test_models_and_completions_are_the_servers(server: RealServer, proxy: Proxy) -> None:
    """transformers lists the models of the hub's cache, and fails without one."""
    direct, through = (httpx2.get(f"{url}/models", timeout=120) for url in (server.url, proxy.url))
    assert through.status_code == direct.status_code
    if direct.is_success:
        assert [each["id"] for each in through.json()["data"]] == [each["id"] for each in direct.json()["data"]]
    body = {"model": server.model, "prompt": "One, two, three,", "temperature": 0, "max_tokens": 8}
    direct, through = (httpx2.post(f"{url}/completions", json=body, timeout=120) for url in (server.url, proxy.url))
    assert through.status_code == direct.status_code == 200
    assert through.json()["choices"][0]["text"] == direct.json()["choices"][0]["text"] != ""


def outcome(client: OpenAI, body: dict[str, Any]) -> tuple[int, Any]:
    """The status of an answer, and of a good one its message, else the server's body."""
    try:
        answer = client.chat.completions.with_raw_response.create(**body)
    except APIStatusError as error:
        return error.status_code, error.response.json()
    message = json.loads(answer.text)["choices"][0]["message"]
    for call in message.get("tool_calls") or []:
        call.pop("id")  # a random one
    return answer.http_response.status_code, message


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True, "top_logprobs": 2},
        {"extra_body": {"no_such_field": 1}},
    ],
    ids=lambda more: "-".join(more),
)
def test_fields_that_are_not_ours_pass(server: RealServer, proxy: Proxy, more: dict[str, Any]) -> None:
    with clients(server, proxy) as (direct, through):
        body = chat(server, "What is the weather in Paris?", **more)
        assert outcome(through, body) == outcome(direct, body)


@pytest.mark.parametrize(
    "more",
    [
        {"model": "no-such-model"},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"messages": [{"role": "user", "content": "word " * 600}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    ],
    ids=["unknown model", "wrong type", "out of range", "too long", "an image"],
)
def test_errors_have_the_servers_status_and_body(server: RealServer, proxy: Proxy, more: dict[str, Any]) -> None:
    """All servers refuse some of these, and each refuses others."""
    body = chat(server) | more
    answers = [httpx2.post(f"{url}/chat/completions", json=body, timeout=120) for url in (server.url, proxy.url)]
    direct, through = answers
    assert through.status_code == direct.status_code
    if direct.is_error and direct.headers["content-type"].startswith("application/json"):
        assert comparable(through.json()) == comparable(direct.json())
    assert through.headers["x-request-id"]


def comparable(error: Any) -> Any:
    """An error without what differs from one request to the next."""
    return json.loads(json.dumps(error), object_hook=lambda found: {k: v for k, v in found.items() if k != "id"})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_spares_the_server_the_rest(server: RealServer, proxy: Proxy, stream: bool) -> None:
    """In processor time of the server, which goes on computing if it is not told, or does not listen."""
    if server.process is None:
        pytest.skip("the server was not started here: its processor time is not known")
    count = ", ".join(map(str, range(1, 12)))  # which it continues up to the limit
    body = {"model": server.model, "prompt": f"{count},", "temperature": 0, "max_tokens": 200}
    before, began = server.cpu_seconds(), time.monotonic()
    answer = httpx2.post(f"{server.url}/completions", json=body, timeout=300)
    whole, duration = server.cpu_seconds() - before, time.monotonic() - began
    assert answer.json()["usage"]["completion_tokens"] == 200
    before = server.cpu_seconds()
    if stream:
        with httpx2.stream("POST", f"{proxy.url}/completions", json=body | {"stream": True}, timeout=300) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{proxy.url}/completions", json=body, timeout=duration / 8)
    time.sleep(duration)
    left = server.cpu_seconds() - before
    proxy.settle()
    assert left < 0.5 * whole or not (stream or server.stops_without_stream), (left, whole, duration)


def metrics(server: RealServer) -> str:
    """What the server counts; empty if it does not say."""
    answer = httpx2.get(f"{server.root}/metrics", timeout=120)
    return str(answer.text) if answer.is_success else ""


def running(server: RealServer) -> float | None:
    """The requests that run, by vLLM's count; None if the server has none."""
    found = re.findall(r"^vllm:num_requests_running(?:{.*})? (\S+)$", metrics(server), re.MULTILINE)
    return sum(map(float, found)) if found else None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request_by_the_servers_own_count(
    server: RealServer, proxy: Proxy, stream: bool
) -> None:
    """In vLLM's metrics: the request runs, and soon after the client has left it does not, long before its end."""
    if running(server) is None:
        pytest.skip("the server does not count its requests in vLLM's way")

    def waited(count: int, seconds: float) -> float:
        began = time.monotonic()
        while running(server) != count:
            assert time.monotonic() - began < seconds, f"{running(server)} requests run"
            time.sleep(0.05)
        return time.monotonic() - began

    waited(0, 60)
    count = ", ".join(map(str, range(1, 12)))
    body = {"model": server.model, "prompt": f"{count},", "max_tokens": 200, "ignore_eos": True}
    began = time.monotonic()
    answer = httpx2.post(f"{server.url}/completions", json=body, timeout=300)
    whole = time.monotonic() - began
    assert answer.json()["usage"]["completion_tokens"] == 200
    if stream:
        with httpx2.stream("POST", f"{proxy.url}/completions", json=body | {"stream": True}, timeout=300) as reply:
            next(reply.iter_raw())
            waited(1, whole)
    else:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{proxy.url}/completions", json=body, timeout=whole / 4)
    assert waited(0, whole) < whole / 2
    proxy.settle()


def test_a_server_that_is_killed_in_mid_stream_is_told_in_band_and_then_by_status(
    server: RealServer, proxy: Proxy
) -> None:
    """The last test of each server, which it ends."""
    if server.process is None:
        pytest.skip("the server was not started here")
    body = chat(server, "Count from one to a hundred.", stream=True) | {"max_tokens": 200}
    with httpx2.stream("POST", f"{proxy.url}/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200
        parts = answer.iter_raw()
        received = next(parts)
        server.kill()
        received += b"".join(parts)
    *_, last = (line for line in received.split(b"\n") if line.startswith(b"data: "))
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"].startswith("target_"), error
    with OpenAI(base_url=proxy.url, api_key="unused", max_retries=0, timeout=120) as through:
        status, _ = outcome(through, chat(server))
    assert status == 502
    proxy.settle()
