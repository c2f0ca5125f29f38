"""A client that leaves cancels what the target does for it, at once; and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from pathlib import Path

import pytest
from proxies import CHAT, Proxy, Shouting, leave_at_random, proxied, reset
from upstream import EVENTS, Upstream

MODELS = ("m", "odd", "stalls", "never", "slow", "dies-in-stream")


def _ask(proxy: Proxy, **fields: object) -> socket.socket:
    """Send a request, and leave its answer to be read."""
    body = json.dumps(CHAT | fields).encode()
    client = socket.create_connection(("127.0.0.1", proxy.port), 10)
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return client


def _read_until(client: socket.socket, part: bytes) -> bytes:
    data = b""
    while part not in data:
        data += client.recv(65536)
    return data


def _leave_before(proxy: Proxy, upstream: Upstream, stream: bool) -> None:
    client = _ask(proxy, model="never", stream=stream)
    upstream.wait_for(lambda: len(upstream.received) == 1)
    client.close()


def _leave_in_stream(proxy: Proxy, upstream: Upstream, stream: bool) -> None:
    client = _ask(proxy, model="stalls", stream=True)
    _read_until(client, EVENTS[1])
    reset(client)


@pytest.mark.parametrize(("leave", "stream"), [(_leave_before, True), (_leave_before, False), (_leave_in_stream, True)])
def test_a_disconnect_cancels_the_target_at_once(upstream: Upstream, proxy: Proxy, leave: object, stream: bool) -> None:
    assert callable(leave)
    leave(proxy, upstream, stream)
    began = time.monotonic()
    upstream.wait_for(lambda: upstream.cancelled == 1)
    assert time.monotonic() - began < 2
    proxy.settle()
    assert proxy.metric('alignpro_errors_total{code="client_gone"}') == 1


def test_a_disconnect_cancels_the_rewriting(upstream: Upstream) -> None:
    runs = Shouting()
    runs.seconds = 60
    with proxied(upstream.url, runs) as proxy:
        client = _ask(proxy)
        upstream.wait_for(lambda: bool(runs.asked))
        client.close()
        upstream.wait_for(lambda: runs.cancelled == 1)
        proxy.settle()
    assert not upstream.received


def test_a_client_that_leaves_while_it_waits_frees_its_place_in_the_queue(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"concurrent": 1, "queued": 1}) as proxy:
        first = _ask(proxy, model="never")
        upstream.wait_for(lambda: len(upstream.received) == 1)
        second = _ask(proxy)
        upstream.wait_for(lambda: proxy.service.admission.waiting == 1)
        second.close()
        upstream.wait_for(lambda: proxy.service.admission.waiting == 0)
        third = _ask(proxy)
        upstream.wait_for(lambda: proxy.service.admission.waiting == 1)
        first.close()
        assert _read_until(third, b"}}").startswith(b"HTTP/1.1 200")
        third.close()


def test_a_client_that_reads_nothing_is_cut_off(upstream: Upstream) -> None:
    with proxied(upstream.url, limits={"idle_seconds": 0.5}) as proxy:
        client = _ask(proxy, model="large", stream=True)
        upstream.wait_for(lambda: len(upstream.received) == 1)
        upstream.wait_for(lambda: upstream.open == 0)
        assert upstream.served == 0
        proxy.settle()
        upstream.wait_for(lambda: not proxy.server.server_state.connections)
        client.close()


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_disconnects_leave_nothing_behind(upstream: Upstream, count: int) -> None:
    upstream.pause = 0.001
    with proxied(upstream.url) as proxy:
        leave_at_random(proxy, 30, MODELS)
        upstream.wait_for(lambda: not proxy.server.server_state.connections)
        time.sleep(0.1)
        gc.collect()
        files, objects = _open_files(), len(gc.get_objects())
        leave_at_random(proxy, count, MODELS)
        upstream.wait_for(lambda: not proxy.server.server_state.connections)
        proxy.settle()
        time.sleep(0.1)
        gc.collect()
        assert proxy.service.admission.running == proxy.service.admission.waiting == 0
        assert _open_files() <= files + 8  # connections to the target that are kept
        assert len(gc.get_objects()) < objects + 3000
        assert proxy.in_loop(_tasks()) <= 3


async def _tasks() -> int:
    return len(asyncio.all_tasks())
