"""What is measured: what the proxy adds to a chat, and its memory and sockets under many streams and disconnects.

Client, proxy and target are processes of their own on this machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.serving.processes import CPUSeconds, chat, load, proxy, quantile, target
from benchmarks.serving.upstream import STREAM

PROMPT = "Rewrite the following sentence so that it says the same in fewer words, and name what was left out. " * 2


def overhead(concurrency: int, latency: float, seconds: float, rounds: int) -> dict[str, Any]:
    """Milliseconds of a chat, direct and through the proxy in turn, and the CPU time of each process per chat.

    The overhead is the quantile through the proxy less the median of direct chats.
    """
    ways: dict[str, list[float]] = {"direct": [], "proxy": []}
    cpu = {way: {"client": 0.0, "target": 0.0, "proxy": 0.0} for way in ways}
    bodies = [chat(PROMPT, max_tokens=64)]
    with target(latency) as (url, answering), proxy(url) as (proxy_url, relaying):
        load(proxy_url, bodies, concurrency, min(seconds, 2), latency)  # connections are opened, code is warm
        for _ in range(rounds):
            for way, base in (("direct", url), ("proxy", proxy_url)):
                before = CPUSeconds.of(answering), CPUSeconds.of(relaying)
                done = load(base, bodies, concurrency, seconds, latency)
                ways[way] += done["milliseconds"]
                cpu[way]["client"] += done["cpu_seconds"]
                cpu[way]["target"] += (CPUSeconds.of(answering) - before[0]).total
                cpu[way]["proxy"] += (CPUSeconds.of(relaying) - before[1]).total
    row: dict[str, Any] = {"concurrency": concurrency, "latency_ms": 1000 * latency, "rounds": rounds}
    for way, milliseconds in ways.items():
        row[way] = {
            "chats": len(milliseconds),
            **{f"p{round(100 * share)}_ms": quantile(milliseconds, share) for share in (0.5, 0.9, 0.99)},
            "cpu_ms_per_chat": {name: 1000 * spent / len(milliseconds) for name, spent in cpu[way].items()},
        }
    median = row["direct"]["p50_ms"]
    row["overhead"] = {name: row["proxy"][name] - median for name in ("p50_ms", "p90_ms", "p99_ms")}
    return row


def _request(url: str, stream: bool) -> bytes:
    body = json.dumps(chat("hi", stream=stream)).encode()
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
    with target(interval) as (url, _), proxy(url) as (proxy_url, process):

        async def run() -> tuple[list[bytes], list[dict[str, float]]]:
            states: list[dict[str, float]] = []

            async def watch() -> None:
                while True:
                    states.append(_state(process))
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
            "mib_after": _state(process)["mib"],
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
    with target(latency) as (url, _), proxy(url) as (proxy_url, process):

        async def run(number: int) -> None:
            places = asyncio.Semaphore(concurrency)

            async def one(moment: float, stream: bool) -> None:
                async with places:
                    await _leave(proxy_url, moment, stream)

            await asyncio.gather(*(one(draw.random() * 3 * latency, draw.random() < 0.5) for _ in range(number)))

        asyncio.run(run(count))  # how many are open at once decides how much memory the process keeps
        before = _settled(process)
        asyncio.run(run(count))
        after = _settled(process)
    return {"disconnects": count, "before": before, "after": after}


async def _ask(url: str) -> tuple[int, bool, float]:
    """The status of an answer, whether it says when to come again, and its milliseconds, connecting included."""
    began = time.perf_counter()
    reader, writer = await _open(url)
    try:
        writer.write(_request(url, False))
        answer = await reader.read()
    finally:
        writer.close()
    head = answer.partition(b"\r\n\r\n")[0].lower()
    return int(head.split()[1]), b"\r\nretry-after: " in head, 1000 * (time.perf_counter() - began)


def overload(count: int, places: int, queued: int, latency: float) -> dict[str, Any]:
    """What becomes of this many chats at once where there are too few places, and of one after the other after that.

    A proxy that keeps its limits answers as many as have a place or wait for one, or more when places become free meanwhile.
    """
    limits = {"limits.concurrent": places, "limits.queued": queued}
    with target(latency) as (url, _), proxy(url, keys=limits) as (proxy_url, _):

        async def run() -> tuple[list[tuple[int, bool, float]], list[tuple[int, bool, float]]]:
            await _ask(proxy_url)
            at_once = await asyncio.gather(*(_ask(proxy_url) for _ in range(count)))
            return list(at_once), [await _ask(proxy_url) for _ in range(10)]

        at_once, after = asyncio.run(run())
    refused = [answer for answer in at_once if answer[0] == 429]
    answered = [answer for answer in at_once if answer[0] == 200]
    return {
        "chats": count,
        "places": places,
        "queued": queued,
        "answered": len(answered),
        "refused": len(refused),
        "refused_with_retry_after": sum(told for _, told, _ in refused),
        "other": count - len(answered) - len(refused),
        "refused_p99_ms": quantile([ms for _, _, ms in refused] or [0.0], 0.99),
        "answered_p99_ms": quantile([ms for _, _, ms in answered] or [0.0], 0.99),
        "answered_after": sum(status == 200 for status, _, _ in after),
        "median_ms_after": quantile([ms for _, _, ms in after], 0.5),
    }
