"""What is measured: what the proxy adds to a chat, and its memory and sockets under many streams and disconnects.

Client, proxy and target are processes of their own on this machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.serving.upstream import STREAM


@contextmanager
def _target(latency: float) -> Iterator[tuple[str, psutil.Process]]:
    arguments = [sys.executable, "-m", "benchmarks.serving.upstream", str(latency)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), psutil.Process(process.pid)
        finally:
            process.terminate()


@contextmanager
def _proxy(target: str) -> Iterator[tuple[str, psutil.Process]]:
    """The command, with its log of requests, which goes to a pipe that nobody reads if it is not sent elsewhere."""
    arguments = [sys.executable, "-m", "alignpro", "serve", "--target", target, "--port", "0"]
    arguments += ["--config", "log.file=/dev/null"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found is not None
            yield found[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _load(url: str, concurrency: int, seconds: float, latency: float) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "benchmarks.serving.load", url]
    numbers = map(str, (concurrency, seconds, latency))
    done = subprocess.run([*arguments, *numbers], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def overhead(concurrency: int, latency: float, seconds: float, rounds: int) -> dict[str, Any]:
    """Milliseconds of a chat, direct and through the proxy in turn, and the CPU time of each process per chat.

    The overhead is the quantile through the proxy less the median of direct chats.
    """
    ways: dict[str, list[float]] = {"direct": [], "proxy": []}
    cpu = {way: {"client": 0.0, "target": 0.0, "proxy": 0.0} for way in ways}
    with _target(latency) as (url, target), _proxy(url) as (proxy_url, proxy):
        _load(proxy_url, concurrency, min(seconds, 2), latency)  # connections are opened, code is warm
        for _ in range(rounds):
            for way, base in (("direct", url), ("proxy", proxy_url)):
                before = _cpu_seconds(target), _cpu_seconds(proxy)
                done = _load(base, concurrency, seconds, latency)
                ways[way] += done["milliseconds"]
                cpu[way]["client"] += done["cpu_seconds"]
                cpu[way]["target"] += _cpu_seconds(target) - before[0]
                cpu[way]["proxy"] += _cpu_seconds(proxy) - before[1]
    row: dict[str, Any] = {"concurrency": concurrency, "latency_ms": 1000 * latency, "rounds": rounds}
    for way, milliseconds in ways.items():
        row[way] = {
            "chats": len(milliseconds),
            **{f"p{round(100 * share)}_ms": _quantile(milliseconds, share) for share in (0.5, 0.9, 0.99)},
            "cpu_ms_per_chat": {name: 1000 * spent / len(milliseconds) for name, spent in cpu[way].items()},
        }
    median = row["direct"]["p50_ms"]
    row["overhead"] = {name: row["proxy"][name] - median for name in ("p50_ms", "p90_ms", "p99_ms")}
    return row


def _request(url: str, stream: bool) -> bytes:
    body = json.dumps({"model": "bench", "stream": stream, "messages": [{"role": "user", "content": "hi"}]}).encode()
    head = f"POST {urlsplit(url).path}/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


async def _open(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def _read_stream(url: str) -> bytes:
    """The body of one stream, without its chunks' sizes."""
    reader, writer = await _open(url)
    try:
        writer.write(_request(url, True))
        await reader.readuntil(b"\r\n\r\n")
        body = b""
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:size]
        return body
    finally:
        writer.close()


def _state(process: psutil.Process) -> dict[str, float]:
    return {"mib": process.memory_info().rss / 2**20, "files": process.num_fds()}


def _settled(process: psutil.Process) -> dict[str, float]:
    """The state once the number of open files has not changed for two seconds: what was sent is worked through."""
    counts = [-1]
    for _ in range(240):
        counts.append(process.num_fds())
        if len(set(counts[-5:])) == 1:
            break
        time.sleep(0.5)
    return _state(process)


def streams(count: int, interval: float) -> dict[str, Any]:
    """Memory of the proxy before, during and after this many streams at the same time, all of which must be the target's."""
    with _target(interval) as (url, _), _proxy(url) as (proxy_url, proxy):

        async def run() -> tuple[list[bytes], list[dict[str, float]]]:
            states: list[dict[str, float]] = []

            async def watch() -> None:
                while True:
                    states.append(_state(proxy))
                    await asyncio.sleep(0.5)

            await _read_stream(proxy_url)
            watching = asyncio.create_task(watch())
            await asyncio.sleep(0)
            bodies = await asyncio.gather(*(_read_stream(proxy_url) for _ in range(count)))
            watching.cancel()
            return bodies, states

        bodies, states = asyncio.run(run())
        middle = states[len(states) // 2 :]
        return {
            "streams": count,
            "equal": sum(body == STREAM for body in bodies),
            "seconds": len(states) / 2,
            "mib_before": states[0]["mib"],
            "mib_most": max(state["mib"] for state in states),
            "mib_growth_in_second_half": max(state["mib"] for state in middle) - middle[0]["mib"],
            "mib_after": _state(proxy)["mib"],
            "files_most": max(state["files"] for state in states),
        }


async def _leave(url: str, moment: float, stream: bool) -> None:
    reader, writer = await _open(url)
    try:
        writer.write(_request(url, stream))
        async with asyncio.timeout(moment):
            await reader.read()
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()


def disconnects(count: int, concurrency: int, latency: float) -> dict[str, Any]:
    """Memory and sockets of the proxy before and after clients that leave at random moments, when as many have left before."""
    draw = random.Random(0)
    with _target(latency) as (url, _), _proxy(url) as (proxy_url, proxy):

        async def run(number: int) -> None:
            places = asyncio.Semaphore(concurrency)

            async def one(moment: float, stream: bool) -> None:
                async with places:
                    await _leave(proxy_url, moment, stream)

            await asyncio.gather(*(one(draw.random() * 3 * latency, draw.random() < 0.5) for _ in range(number)))

        asyncio.run(run(count))  # how many are open at once decides how much memory the process keeps
        before = _settled(proxy)
        asyncio.run(run(count))
        after = _settled(proxy)
    return {"disconnects": count, "before": before, "after": after}
