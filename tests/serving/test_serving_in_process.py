"""Prompter and target in one process, over HTTP: what is refused before it costs anything, and what clients leave behind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from openai import OpenAI
from proxies import Proxy, leave_at_random, open_files, running
from random_requests import FIELDS, answer_to, body_of, random_request
from rewriting_runs import save_run
from tiny_models import save_tiny

from alignpro.config import ServeConfig, validate_config
from alignpro.serving.rewriting import Rewriting
from alignpro.serving.server import open_service

CHAT: Any = {"model": "target", "messages": [{"role": "user", "content": "stay"}], "max_tokens": 4, "temperature": 0}
LIMITS = {"header_seconds": 1, "body_seconds": 1, "keep_alive_seconds": 1}
"""Requests whose end does not come are soon given up."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Return a proxy of a random prompter before a random target."""
    folder = tmp_path_factory.mktemp("serving")
    run, target = save_run(folder / "run"), save_tiny("llama", folder / "target")
    settings = {"engine": {"pool_bytes": 1 << 22}, "guards": [], "skip_truncated": False, "deadline_ms": 60_000}
    common = {"listen": {"port": 0}, "log": {"requests": False}, "rewriting": settings, "limits": LIMITS}
    config = validate_config(ServeConfig, {"target": str(target), "runs": [str(run)], **common})
    with running(config, lambda: open_service(config), 60) as served:
        yield served


def test_a_model_that_is_not_there_is_refused_before_anything_is_rewritten(proxy: Proxy) -> None:
    reply = proxy.ask(CHAT | {"model": "other"})
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "target" in error["message"]
    assert reply.headers["x-alignpro-rewrite"] == "skipped:refused"
    assert proxy.ask(CHAT).headers["x-alignpro-rewrite"] == "applied"


def test_what_the_target_cannot_honour_costs_no_rewrite(proxy: Proxy) -> None:
    reply = proxy.ask(CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "tools")
    assert reply.headers["x-alignpro-rewrite"] == "skipped:refused"


def test_the_official_client_gets_log_probabilities(proxy: Proxy) -> None:
    with OpenAI(base_url=proxy.url, api_key="unused", max_retries=0) as client:
        (choice,) = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices
        assert {len(each.top_logprobs) for each in choice.logprobs.content} == {2}
        (text,) = client.completions.create(model="target", prompt="stay", max_tokens=4, logprobs=1, seed=1).choices
        assert len(text.logprobs.token_logprobs) == len(text.logprobs.tokens) > 0


@pytest.mark.parametrize("count", [12, pytest.param(10_000, marks=pytest.mark.slow)])
def test_disconnects_leave_no_page_task_or_socket(proxy: Proxy, count: int) -> None:
    """Clients leave while their prompt is rewritten, and while it is answered."""
    lines = ('alignpro_errors_total{code="client_gone"}', 'alignpro_rewrites_total{run="run"}')
    assert proxy.ask(CHAT).status == 200
    gone, rewritten = map(proxy.metric, lines)
    proxy.settle(connections=False)
    files, tasks = open_files(), proxy.tasks()
    leave_at_random(proxy, count, ["target"], 0.05)
    proxy.settle()
    assert proxy.metric(lines[0]) - gone > 0.2 * count
    assert proxy.metric(lines[1]) - rewritten > 0.1 * count
    assert proxy.ask(CHAT).status == 200
    proxy.settle(connections=False)
    assert open_files() <= files
    assert proxy.tasks() <= tasks
    assert isinstance(proxy.service._runs, Rewriting)
    thread = proxy.service._runs._engine
    (engine,) = thread._engines
    assert (engine.num_unfinished_requests, thread._pending, thread._requests, thread._waiting) == (0, {}, {}, {})
    engine.release()
    assert all(sum(pool.used.values()) == 0 for pool in engine.pools.values())


def _ask_at_random(proxy: Proxy, count: int, seed: int) -> Counter[bytes]:
    draw = random.Random(seed)
    statuses: Counter[bytes] = Counter()
    for number in range(count):
        chat: dict[str, Any] = CHAT | {"messages": [{"role": "user", "content": f"stay {number}"}]}
        completion = {"model": "target", "prompt": f"stay {number}", "max_tokens": 4}
        base, path = draw.choice([(chat, b"/v1/chat/completions"), (completion, b"/v1/completions")])
        names = [*FIELDS, "max_tokens", "temperature", "seed", "stop", "logprobs", "model", "top_p"]
        data, stream = random_request(draw, base, path, names)
        answer = answer_to(proxy, data)
        status = answer[9:12]
        statuses[status] += 1
        assert not status.startswith(b"5"), (data, answer)
        if stream is not None:
            assert status == b"200", (data, answer)
            assert b"x-alignpro-rewrite: applied" in answer.partition(b"\r\n\r\n")[0], (data, answer)
            assert body_of(answer).endswith(b"data: [DONE]\n\n") or not stream, (data, answer)
    return statuses


@pytest.mark.parametrize("count", [80, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests_that_are_rewritten_give_no_server_error(proxy: Proxy, count: int) -> None:
    clients = 8
    with ThreadPoolExecutor(clients) as pool:
        statuses = sum(pool.map(partial(_ask_at_random, proxy, count // clients), range(clients)), Counter[bytes]())
    assert proxy.metric('alignpro_errors_total{code="internal_error"}') == 0
    assert proxy.metric('alignpro_skips_total{reason="error"}') == 0
    proxy.settle(connections=False)
    assert statuses.total() == count
    assert statuses[b"200"] > 0.25 * count
    assert statuses[b"400"] > 0.2 * count
