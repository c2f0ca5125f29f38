"""What passes through the proxy, in either direction, and what a client is told when the target fails."""

from __future__ import annotations

import gzip
import json
from typing import Any
from urllib.parse import unquote

import pytest
from proxies import CHAT, Proxy, Shouting, proxied
from upstream import DONE, EVENTS, ODD_STREAM, Upstream, chat_answer

ODD_BODY = (
    b'{ "model":"m" ,"seed": 1.0e2,"messages":[{"role":"user","content":"h\\u00e4\xc3\xa4\\ud83c"}],\n'
    b'"x":{"b":1,"a":[]},"x":2}  '
)


def _lines(upstream: Upstream) -> set[str]:
    return {name for name, _ in upstream.received[-1].headers}


# ------------------------------------------------------------------------------------------------------------ requests


def test_a_request_that_is_not_rewritten_is_forwarded_byte_for_byte(upstream: Upstream, proxy: Proxy) -> None:
    reply = proxy.ask(ODD_BODY, path="/v1/chat/completions?api-version=1")
    assert (reply.status, reply.body) == (200, chat_answer())
    assert upstream.received[0].body == ODD_BODY
    assert upstream.received[0].path == "/v1/chat/completions?api-version=1"
    assert reply.headers["x-alignpro-rewrite"] == "skipped:no_run"


def test_a_request_in_gzip_reaches_the_target_plain(upstream: Upstream, proxy: Proxy) -> None:
    twice = gzip.compress(ODD_BODY[:20]) + gzip.compress(ODD_BODY[20:])
    assert proxy.ask(twice, content_encoding="gzip").status == 200
    assert upstream.received[0].body == ODD_BODY
    assert upstream.received[0].header("content-encoding") is None


def test_other_routes_pass_as_they_are(upstream: Upstream, proxy: Proxy) -> None:
    body = bytes(range(256)) * 300
    reply = proxy.ask(body, path="/v1/echo/a%20b?c=%2F&d", content_type="multipart/form-data; boundary=x")
    assert (reply.status, reply.body) == (200, body)
    assert reply.headers["content-type"] == "multipart/form-data; boundary=x"
    assert upstream.received[0].path == "/v1/echo/a%20b?c=%2F&d"
    assert proxy.ask(gzip.compress(b"x"), path="/v1/echo", content_encoding="gzip").status == 200
    assert upstream.received[1].header("content-encoding") == "gzip"
    assert [proxy.ask(path="/v1/models", method=method).status for method in ("GET", "HEAD")] == [200, 200]
    assert upstream.received[2].header("content-length") is None


@pytest.mark.parametrize("path", ["/v1/../admin", "/v1/a/%2e%2e/%2E%2e/x", "/v1/a%2f..%2fb", "/%761/models", "/v1/./x"])
def test_no_path_leads_out_of_the_target(upstream: Upstream, proxy: Proxy, path: str) -> None:
    reply = proxy.ask(path=path, method="GET")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
    assert not upstream.received


def test_headers_pass_by_allow_list(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARGET_KEY", "sk-target")
    monkeypatch.setenv("TEAM", "blue")
    keys: dict[str, Any] = {"api_key_env": "TARGET_KEY", "extra_headers": {"X-Team": "env:TEAM"}}
    keys |= {"forward_headers": ["x-mine"], "return_headers": ["set-cookie"]}
    with proxied(upstream.url, **keys) as proxy:
        told = {"authorization": "Bearer sk-client", "cookie": "a=b", "openai_organization": "org", "x_other": "1"}
        passed = {"x_mine": "1", "x_stainless_lang": "python", "traceparent": "00-1", "accept_language": "de"}
        reply = proxy.ask(CHAT, **told, **passed, x_team="red", x_request_id="mine-1")
        received = upstream.received[-1]
        assert received.header("authorization") == "Bearer sk-target"
        assert received.header("x-team") == "blue"
        assert not {"cookie", "openai-organization", "x-other"} & _lines(upstream)
        assert {"x-mine", "x-stainless-lang", "traceparent", "accept-language"} <= _lines(upstream)
        assert received.header("x-request-id") == reply.headers["x-request-id"] == "mine-1"
        assert reply.headers["x-upstream-request-id"] == "up-1"
        assert reply.headers["x-ratelimit-remaining-requests"] == "9"
        assert reply.headers["set-cookie"] == "a=b"
    with proxied(upstream.url) as proxy:
        assert "set-cookie" not in proxy.ask(CHAT, **told).headers
        assert "authorization" not in _lines(upstream)


def test_the_clients_key_passes_if_that_is_configured(upstream: Upstream) -> None:
    with proxied(upstream.url, access={"forward_authorization": True}) as proxy:
        proxy.ask(CHAT, authorization="Bearer sk-client", openai_project="p")
    assert upstream.received[0].header("authorization") == "Bearer sk-client"
    assert upstream.received[0].header("openai-project") == "p"


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [("limited", 429, "their_code"), ("unknown", 404, "their_code"), ("broken", 500, "their_code")],
)
def test_the_targets_errors_pass_with_their_status(proxy: Proxy, model: str, status: int, code: str) -> None:
    reply = proxy.ask(CHAT | {"model": model})
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["x-request-id"].startswith("req_")
    if model == "limited":
        assert (reply.headers["retry-after"], reply.headers["x-ratelimit-limit-requests"]) == ("7", "10")


def test_a_stream_equals_the_targets(proxy: Proxy, upstream: Upstream) -> None:
    upstream.pause = 0.002
    reply = proxy.ask(CHAT | {"stream": True})
    assert reply.body == b"".join(EVENTS) + DONE
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in reply.headers
    assert proxy.ask(CHAT | {"model": "odd", "stream": True}).body == ODD_STREAM


def test_an_encoded_answer_keeps_its_encoding(proxy: Proxy) -> None:
    reply = proxy.ask(CHAT | {"model": "zipped"}, accept_encoding="gzip")
    assert reply.headers["content-encoding"] == "gzip"
    assert gzip.decompress(reply.body) == chat_answer()
    assert int(reply.headers["content-length"]) == len(reply.body)


def test_a_target_that_dies_in_a_stream_is_told_in_the_stream(proxy: Proxy) -> None:
    reply = proxy.ask(CHAT | {"model": "dies-in-stream", "stream": True})
    whole, _, last = reply.body.removesuffix(b"\n\n").rpartition(b"\n\n")
    assert (reply.status, whole) == (200, b"".join(EVENTS[:2]).removesuffix(b"\n\n"))
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "target_failed"
    within = proxy.ask(CHAT | {"model": "dies-in-line", "stream": True}).body
    assert within.startswith(EVENTS[0] + EVENTS[1][:20] + b'\n\ndata: {"error":')


def test_a_target_that_dies_in_a_body_ends_the_connection(proxy: Proxy) -> None:
    with pytest.raises((ConnectionError, Exception), match=r"IncompleteRead|reset"):
        proxy.ask(CHAT | {"model": "dies-in-body"})
    proxy.settle()
    assert proxy.metric('alignpro_errors_total{code="target_failed"}') == 1


@pytest.mark.parametrize("model", ["dies-before", "garbage", "odd-status", "upgrades"])
def test_a_target_that_gives_no_answer_is_a_bad_gateway(proxy: Proxy, model: str) -> None:
    reply = proxy.ask(CHAT | {"model": model})
    assert (reply.status, reply.json()["error"]["code"]) == (502, "target_failed")
    assert reply.headers["x-alignpro-rewrite"] == "skipped:no_run"
    assert "127.0.0.1" not in reply.body.decode()


def test_a_target_that_is_not_there_is_a_bad_gateway(upstream: Upstream) -> None:
    with Upstream() as gone:
        pass
    with proxied(gone.url) as proxy:
        assert proxy.ask(CHAT).status == 502
        assert proxy.ask(path="/ready", method="GET").json()["problems"] == ["The target cannot be reached."]


def test_a_target_that_never_answers_is_a_gateway_timeout(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"idle_seconds": 0.2}) as proxy:
        reply = proxy.ask(CHAT | {"model": "never"})
        assert (reply.status, reply.json()["error"]["code"]) == (504, "target_timeout")
        stalled = proxy.ask(CHAT | {"model": "stalls", "stream": True})
        assert stalled.body.startswith(b"".join(EVENTS[:2]))
        assert b'"code": "target_timeout"' in stalled.body
        upstream.wait_for(lambda: upstream.cancelled == 2)


def test_a_whole_request_has_a_limit(upstream: Upstream) -> None:
    upstream.pause = 0.15
    with proxied(upstream.url, limits={"total_seconds": 0.4}) as proxy:
        assert b'"code": "target_timeout"' in proxy.ask(CHAT | {"stream": True}).body


# ------------------------------------------------------------------------------------------------------------ rewrites


def test_a_rewrite_is_sent_and_told_in_headers(upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting()) as proxy:
        reply = proxy.ask(b'{"model":"m","messages":[{"role":"user","content":"hello"}],"n": 1.0}')
        assert upstream.received[0].body == b'{"model":"m","messages":[{"role":"user","content":"HELLO"}],"n": 1.0}'
        assert reply.body == chat_answer()
        told = {name: value for name, value in reply.headers.items() if name.startswith("x-alignpro")}
        assert told == {
            "x-alignpro-rewrite": "applied",
            "x-alignpro-rewrite-hash": "3733cd977ff8eb18",
            "x-alignpro-run": "loud",
            "x-alignpro-ms": "12.5",
        }
        assert proxy.metric('alignpro_rewrites_total{run="loud"}') == 1


def test_a_rewrite_is_given_back_on_request(upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting()) as proxy:
        messages = b'"messages":[{"role":"user","content":"h\xc3\xa4"}]'
        reply = proxy.ask(b'{"alignpro": {"return": "body"}, "model":"m", %b}' % messages, accept_encoding="gzip")
        assert upstream.received[-1].body == b'{"model":"m", "messages":[{"role":"user","content":"H\xc3\x84"}]}'
        assert upstream.received[-1].header("accept-encoding") is None
        field = reply.json().pop("alignpro")
        assert field == {"rewrite": "HÄ", "applied": True, "skipped": None, "run": "loud", "ms": 12.5}
        assert reply.body.startswith(chat_answer()[:-1])
        reply = proxy.ask(b'{"model":"m", %b, "alignpro": {"return": "header", "run": "quiet"}}' % messages)
        assert reply.body == chat_answer()
        assert unquote(reply.headers["x-alignpro-rewritten"]) == "HÄ"
        assert reply.headers["x-alignpro-run"] == "quiet"
        streamed = proxy.ask(b'{"model":"odd", %b, "stream": true, "alignpro": {"return": "body"}}' % messages)
        assert (streamed.body, unquote(streamed.headers["x-alignpro-rewritten"])) == (ODD_STREAM, "HÄ")
        zipped = proxy.ask(b'{"model":"zipped", %b, "alignpro": {"return": "body"}}' % messages)
        assert gzip.decompress(zipped.body) == chat_answer()
        assert unquote(zipped.headers["x-alignpro-rewritten"]) == "HÄ"


def test_an_answer_that_is_too_large_for_the_field_passes_as_it_is(upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting(), limits={"answer_bytes": 100}) as proxy:
        reply = proxy.ask(CHAT | {"alignpro": {"return": "body"}})
        assert (reply.body, reply.headers["x-alignpro-rewritten"]) == (chat_answer(), "HELLO")


def test_a_client_may_opt_out_and_choose_a_run(upstream: Upstream) -> None:
    runs = Shouting()
    with proxied(upstream.url, runs) as proxy:
        assert proxy.ask(CHAT, x_alignpro_opt_out="1").headers["x-alignpro-rewrite"] == "skipped:opt_out"
        assert proxy.ask(CHAT | {"alignpro": {"opt_out": True}}).headers["x-alignpro-rewrite"] == "skipped:opt_out"
        assert json.loads(upstream.received[-1].body) == CHAT
        assert proxy.ask(CHAT, x_alignpro_run="quiet").headers["x-alignpro-run"] == "quiet"
        assert proxy.ask(CHAT, x_alignpro_run="none").json()["error"]["code"] == "run_not_found"
        users = [asked.user for asked in runs.asked]
        assert users == [None, None, None]
        proxy.ask(CHAT | {"user": "ann"})
        proxy.ask(CHAT, authorization="Bearer t")
        assert len({asked.user for asked in runs.asked}) == 3
        assert all(len(asked.user or "") == 32 for asked in runs.asked[3:])
