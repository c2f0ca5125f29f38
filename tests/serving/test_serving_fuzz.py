"""Random requests: no error of the proxy's own, no hang, and bytes that are the target's."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from proxies import CHAT, Proxy, proxied
from random_requests import answer_to, body_of, random_request
from upstream import DONE, EVENTS, Upstream, chat_answer

_CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
_CLIENTS = 16
_ANSWERS = {False: chat_answer(), True: b"".join(EVENTS) + DONE}


def _ask_at_random(proxy: Proxy, upstream: Upstream, count: int, seed: int) -> Counter[bytes]:
    """The statuses of the answers to random requests, each after the other."""
    draw = random.Random(seed)
    statuses: Counter[bytes] = Counter()
    for _ in range(count):
        upstream.received.clear()
        api = draw.choice([b"chat/completions", b"completions"])
        data, stream = random_request(draw, CHAT, b"/v1/" + api)
        answer = answer_to(proxy, data)
        status = answer[9:12]
        statuses[status] += 1
        assert not status.startswith(b"5"), (data, answer)
        if stream is not None:
            assert (status, body_of(answer)) == (b"200", _ANSWERS[stream]), (data, answer)
    return statuses


@pytest.mark.parametrize("count", [320, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_requests_give_no_error_of_the_proxys_own(upstream: Upstream, count: int) -> None:
    """Several clients ask at once: most of the time is that of requests whose ends do not come."""
    upstream.pause = 0
    limits = {"header_seconds": 0.2, "body_seconds": 0.2, "keep_alive_seconds": 1, "body_bytes": 1 << 20}
    with proxied(upstream.url, limits=limits) as proxy, ThreadPoolExecutor(_CLIENTS) as clients:
        asked = partial(_ask_at_random, proxy, upstream, count // _CLIENTS)
        statuses = sum(clients.map(asked, range(_CLIENTS)), Counter[bytes]())
        assert proxy.metric('alignpro_errors_total{code="internal_error"}') == 0
        proxy.settle()
    assert statuses.total() == count
    assert statuses[b"200"] > 0.25 * count
    assert statuses[b"400"] > 0.2 * count


@pytest.mark.slow
def test_requests_by_the_proxys_own_description_give_what_it_describes(upstream: Upstream) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    upstream.pause = 0
    with proxied(upstream.url) as proxy:
        root = proxy.url.removesuffix("/v1")
        schemathesis.checks.load_all_checks()
        checks = [schemathesis.checks.CHECKS.get_one(name) for name in _CHECKS]
        asked = 0
        for found in schemathesis.openapi.from_url(f"{root}/openapi.json").get_all_operations():
            for mode in schemathesis.GenerationMode:

                @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
                @given(case=found.ok().as_strategy(generation_mode=mode))
                def ask(case: Any) -> None:
                    nonlocal asked
                    asked += 1
                    case.call_and_validate(base_url=root, checks=checks)

                try:
                    ask()
                except Unsatisfiable:  # there is nothing to get wrong
                    continue
        assert asked > 500
        assert proxy.metric('alignpro_errors_total{code="internal_error"}') == 0
