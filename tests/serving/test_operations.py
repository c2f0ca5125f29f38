"""Health, readiness, metrics, the log, reload, and the drain."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from proxies import CHAT, Proxy, Shouting, proxied
from upstream import DONE, EVENTS, Upstream

from alignpro.config import ServeConfig, validate_config
from alignpro.errors import ModelError


def _log(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_health_and_readiness(upstream: Upstream) -> None:
    runs = Shouting()
    with proxied(upstream.url, runs, runs=["runs/loud", "runs/quiet"]) as proxy:
        assert proxy.ask(path="/health", method="GET").json() == {"status": "ok"}
        ready = proxy.ask(path="/ready", method="GET")
        assert (ready.status, ready.json()) == (200, {"status": "ready", "problems": [], "runs": ["loud", "quiet"]})
        assert upstream.received[-1].path == "/v1/models"
        asked = len(upstream.received)
        runs.failure = "The prompter's thread has ended."
        ready = proxy.ask(path="/ready", method="GET")
        assert (ready.status, ready.json()["problems"]) == (503, ["The prompter's thread has ended."])
        runs.failure, runs.runs = None, ()
        assert proxy.ask(path="/ready", method="GET").json()["problems"] == ["No run is loaded."]
        assert len(upstream.received) == asked, "the target's answer holds for a while"


def test_a_key_that_the_target_refuses_is_not_ready(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "sk")
    with proxied(upstream.url, api_key_env="KEY") as proxy:
        assert proxy.ask(path="/ready", method="GET").status == 200
        assert upstream.received[-1].header("authorization") == "Bearer sk"


def test_metrics_count_what_happened(upstream: Upstream) -> None:
    with proxied(upstream.url, Shouting()) as proxy:
        proxy.ask(CHAT)
        proxy.ask(CHAT, x_alignpro_opt_out="1")
        proxy.ask(b"{")
        proxy.ask(path="/v1/models", method="GET")
        proxy.settle()
        for line, value in {
            'alignpro_requests_total{route="chat",status="200"}': 2,
            'alignpro_requests_total{route="chat",status="400"}': 1,
            'alignpro_requests_total{route="models",status="200"}': 1,
            'alignpro_rewrites_total{run="loud"}': 1,
            'alignpro_skips_total{reason="opt_out"}': 1,
            'alignpro_tokens_total{kind="prompt"}': 6,
            'alignpro_tokens_total{kind="completion"}': 4,
            'alignpro_phase_seconds_count{phase="rewrite"}': 2,
            'alignpro_phase_seconds_count{phase="target"}': 3,
            "alignpro_in_flight": 0,
            "alignpro_runs": 2,
        }.items():
            assert proxy.metric(line) == value, line


def test_metrics_show_what_is_in_flight_and_what_waits(upstream: Upstream) -> None:
    runs = Shouting()
    runs.waiting = 3
    with proxied(upstream.url, runs, limits={"concurrent": 1, "queued": 5}) as proxy:
        asking = [threading.Thread(target=proxy.ask, args=[CHAT | {"model": "slow"}]) for _ in range(3)]
        for thread in asking:
            thread.start()
        upstream.wait_for(lambda: proxy.service.admission.waiting == 2)
        lines = ("alignpro_in_flight", "alignpro_queued", "alignpro_prompter_queue")
        assert [proxy.metric(line) for line in lines] == [1, 2, 3]
        for thread in asking:
            thread.join()
        assert [proxy.metric(line) for line in lines] == [0, 0, 3]


def test_the_tokens_of_a_stream_are_counted(upstream: Upstream, proxy: Proxy) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":11,"total_tokens":18}}\n\n'
    upstream.answers["counted"] = [*EVENTS, usage, DONE]
    assert usage in proxy.ask(CHAT | {"model": "counted", "stream": True}).body
    proxy.settle()
    assert proxy.metric('alignpro_tokens_total{kind="prompt"}') == 7
    assert proxy.metric('alignpro_tokens_total{kind="completion"}') == 11


def test_the_log_holds_no_text_unless_asked(upstream: Upstream, tmp_path: Path) -> None:
    secret = CHAT | {"messages": [{"role": "user", "content": "my secret"}], "user": "ann@example.com"}
    for prompts in (False, True):
        file = tmp_path / f"{prompts}.jsonl"
        with proxied(upstream.url, Shouting(), log={"file": str(file), "prompts": prompts}) as proxy:
            proxy.ask(secret, x_request_id="r-1")
            proxy.ask(b'{"messages": ["my secret"]}')
            proxy.settle()
        first, second = _log(file)
        assert first["request_id"] == "r-1"
        assert (first["status"], first["rewrite"], first["run"], first["model"]) == (200, "applied", "loud", "m")
        assert (first["prompt_tokens"], first["completion_tokens"], first["bytes_out"] > 100) == (3, 2, True)
        assert (second["status"], second["error"]) == (400, "invalid_type")
        assert ("secret" in file.read_text().lower()) == prompts
        assert "ann@" not in file.read_text()


def test_what_a_shadow_rewrite_became_is_logged_and_counted(upstream: Upstream, tmp_path: Path) -> None:
    runs = Shouting()
    runs.shadow = True
    with proxied(upstream.url, runs, log={"file": str(tmp_path / "log.jsonl")}) as proxy:
        assert proxy.ask(CHAT, x_request_id="r-1").headers["x-alignpro-rewrite"] == "skipped:shadow"
        proxy.settle()
        assert proxy.metric('alignpro_unused_rewrites_total{result="rewritten"}') == 1
    later = next(line for line in _log(tmp_path / "log.jsonl") if line.get("later"))
    assert (later["request_id"], later["rewrite"], later["run"]) == ("r-1", "applied", "loud")


def test_a_reload_changes_the_runs_and_keeps_what_is_in_flight(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMINS", "root")
    runs, log = Shouting(), tmp_path / "log.jsonl"
    keys: dict[str, Any] = {"access": {"admin_tokens_env": "ADMINS"}, "log": {"file": str(log)}}
    with proxied(upstream.url, runs, **keys) as proxy:
        fresh = proxy.service.config.model_copy(update={"runs": [Path("runs/quiet"), Path("runs/new")]})
        proxy.service._reread = lambda: fresh
        asking = threading.Thread(target=proxy.ask, args=[CHAT | {"model": "slow"}], kwargs={"x_request_id": "flying"})
        asking.start()
        upstream.wait_for(lambda: len(upstream.received) == 1)
        assert proxy.ask(path="/admin/reload").status == 401
        assert proxy.ask(path="/admin/reload", authorization="Bearer ro").status == 401
        reply = proxy.ask(path="/admin/reload", authorization="Bearer root")
        assert (reply.status, reply.json()) == (200, {"runs": ["quiet", "new"]})
        asking.join()
        assert proxy.ask(CHAT).headers["x-alignpro-run"] == "quiet"

        async def fail(paths: Sequence[Path]) -> Sequence[str]:
            raise ModelError(f"{paths[0]}: no model")

        monkeypatch.setattr(runs, "serve", fail)
        reply = proxy.ask(path="/admin/reload", authorization="Bearer root")
        assert (reply.status, reply.json()["error"]["code"]) == (409, "reload_failed")
        assert "runs/quiet: no model" in reply.json()["error"]["message"]
        assert proxy.ask(CHAT).status == 200
    flying = next(line for line in _log(log) if line["request_id"] == "flying")
    assert (flying["status"], flying["run"]) == (200, "loud")


def test_a_drain_lets_streams_end(upstream: Upstream) -> None:
    upstream.pause = 0.15
    with proxied(upstream.url) as proxy:
        replies: list[bytes] = []
        asking = threading.Thread(target=lambda: replies.append(proxy.ask(CHAT | {"stream": True}).body))
        asking.start()
        upstream.wait_for(lambda: len(upstream.received) == 1)
        proxy.server.should_exit = True
        proxy.thread.join(10)
        asking.join(5)
        assert replies == [b"".join(EVENTS) + DONE]
        with pytest.raises(ConnectionRefusedError):
            proxy.ask(CHAT)


def test_the_end_of_a_drain_is_told(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"drain_seconds": 1}) as proxy:
        replies: list[Any] = []
        bodies = [CHAT | {"model": "stalls", "stream": True}, CHAT | {"model": "never"}]
        asking = [threading.Thread(target=lambda body=body: replies.append(proxy.ask(body))) for body in bodies]
        for thread in asking:
            thread.start()
        upstream.wait_for(lambda: len(upstream.received) == 2)
        time.sleep(0.1)
        proxy.server.should_exit = True
        proxy.thread.join(10)
        for thread in asking:
            thread.join(5)
        assert sorted(reply.status for reply in replies) == [200, 503]
        assert all(b'"code": "stopping"' in reply.body for reply in replies)


def test_pages_of_other_sites_may_call_it_only_if_configured(upstream: Upstream) -> None:
    asks = {"origin": "https://a.example", "access_control_request_method": "POST"}
    with proxied(upstream.url) as proxy:
        assert "access-control-allow-origin" not in proxy.ask(method="OPTIONS", **asks).headers
        assert "access-control-allow-origin" not in proxy.ask(CHAT, origin="https://a.example").headers
    with proxied(upstream.url, listen={"port": 0, "cors_origins": ["https://a.example"]}) as proxy:
        assert proxy.ask(method="OPTIONS", **asks).headers["access-control-allow-origin"] == "https://a.example"
        for body in (CHAT, b"{"):
            told = proxy.ask(body, origin="https://a.example").headers
            assert told["access-control-allow-origin"] == "https://a.example"
            assert "x-request-id" in told["access-control-expose-headers"]
        assert "access-control-allow-origin" not in proxy.ask(CHAT, origin="https://b.example").headers


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"listen": {"host": "127.0.0.1", "port": 0}, "access": {}},
            "listen.host, access without tokens, access without admin_tokens_env",
        ),
        ({"access": {"admin_tokens_env": "ADMINS", "anyone": True}}, "access without tokens"),
        ({"page": {"recent_texts": True}}, "page.recent_texts"),
        ({"model": "dear"}, "model"),
    ],
)
def test_a_reload_leaves_address_and_access_as_they_are(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    """Tokens that are gone would leave a proxy that all can reach, and that still sends our key."""
    monkeypatch.setenv("ADMINS", "root")
    monkeypatch.setenv("CLIENTS", "secret")
    keys: dict[str, Any] = {
        "access": {"admin_tokens_env": "ADMINS", "tokens_env": "CLIENTS"},
        "listen": {"host": "127.0.0.2", "port": 0},
        "page": {"recent_requests": 5},
    }
    before = validate_config(ServeConfig, {"target": upstream.url, **keys})
    after = validate_config(ServeConfig, {"target": upstream.url, **keys, **changes})
    with proxied(upstream.url, Shouting(), **{key: value for key, value in keys.items() if key != "listen"}) as proxy:
        proxy.service.config = before
        proxy.service._reread = lambda: after
        reply = proxy.ask(path="/admin/reload", authorization="Bearer root")
        assert (reply.status, reply.json()["error"]["code"]) == (409, "reload_failed")
        assert f"{named}: a change of this takes a restart" in reply.json()["error"]["message"]
        assert proxy.ask(CHAT).status == proxy.ask(path="/admin/reload").status == 401


def test_a_connection_outlives_an_error_of_the_proxys_own(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    aborted = []
    monkeypatch.setattr("alignpro.serving.frame._break_off", lambda *_, **__: aborted.append(True))
    runs = Shouting()

    async def fail(asked: Any) -> Any:
        raise TypeError("a mistake")

    with proxied(upstream.url, runs) as proxy:
        monkeypatch.setattr(runs, "rewrite", fail)
        assert proxy.ask(CHAT).json()["error"]["code"] == "internal_error"
    assert not aborted
