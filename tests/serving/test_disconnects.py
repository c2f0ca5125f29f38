"""A client that leaves cancels what the target does for it, at once; and nothing stays behind."""

from __future__ import annotations

import gc
import json
import socket
import time
import weakref

import pytest
from proxies import CHAT, Proxy, Shouting, leave_at_random, open_files, proxied, reset
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
        proxy.settle(connections=False)
        client.close()


def test_a_connection_that_is_reset_is_forgotten_at_once(upstream: Upstream, proxy: Proxy) -> None:
    """Not when it would have been idle for too long."""
    client = _ask(proxy)
    _read_until(client, b"}}")
    (connection,) = map(weakref.ref, proxy.server.server_state.connections)
    reset(client)
    proxy.settle(connections=False)

    def is_gone() -> bool:
        gc.collect()
        return connection() is None

    upstream.wait_for(is_gone)


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_disconnects_leave_nothing_behind(upstream: Upstream, count: int) -> None:
    upstream.pause = 0.001
    with proxied(upstream.url) as proxy:
        leave_at_random(proxy, 30, MODELS)
        proxy.settle(connections=False)
        time.sleep(0.1)
        upstream.received.clear()
        gc.collect()
        files, objects = open_files(), len(gc.get_objects())
        leave_at_random(proxy, count, MODELS)
        proxy.settle(connections=False)
        time.sleep(0.1)
        assert len(upstream.received) > 0.1 * count
        upstream.received.clear()  # the test's own
        gc.collect()
        assert proxy.service.admission.running == proxy.service.admission.waiting == 0
        assert open_files() <= files + 8  # connections to the target that are kept
        assert len(gc.get_objects()) < objects + 500
        assert proxy.tasks() <= 3
