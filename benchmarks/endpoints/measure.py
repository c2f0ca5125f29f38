"""What is measured: the client's own time and memory, and the time of a rollout whose rewrites are finished one by one."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignpro.config import BudgetConfig, EndpointConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Answer, Books, DrawKey, Purchase, Query, Sampling, Usage
from benchmarks.endpoints.server import running

SAMPLING = Sampling(max_tokens=128)
PROMPT = "Rewrite the following sentence so that it says the same in fewer words, and name what was left out. " * 2


class NoBooks:
    """Books that record nothing: what the ledger costs is not the client's time."""

    async def find(self, keys: Sequence[DrawKey]) -> list[Answer | None]:
        """Nothing has been received before."""
        return [None] * len(keys)

    async def reserve(self, keys: Sequence[DrawKey], bound: Usage) -> Purchase:
        """There is no budget."""
        return Purchase(0, tuple(keys), bound)

    async def settle(
        self, purchase: Purchase, answers: Sequence[Answer | None], usage: Usage | None
    ) -> list[Answer | None]:
        """They are what they are."""
        return list(answers)

    async def refund(self, purchase: Purchase, reason: str) -> None:
        """Nothing was recorded."""

    async def write_off(self, purchase: Purchase, reason: str) -> None:
        """Nothing was recorded."""


def _query(number: int) -> Query:
    return Query((("user", f"{PROMPT}{number}"),), SAMPLING, number, (number,))


def _ask(endpoint: Endpoint, first: int, count: int) -> None:
    """As a run does: as many at a time as a step has chains."""
    for start in range(first, first + count, 256):
        futures = [endpoint.submit(_query(number)) for number in range(start, min(start + 256, first + count))]
        for future in futures:
            future.result()


def _resident_mib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def _books(recorded: bool) -> Iterator[Books]:
    """A ledger in a directory of its own, with the limits of a budget that suffices; or nothing."""
    if not recorded:
        yield NoBooks()
        return
    with TemporaryDirectory() as directory, Ledger(Path(directory) / "ledger.sqlite") as ledger:
        yield LedgerBooks(ledger, BudgetConfig(requests=10**9, tokens=10**12), {}, "bench")


def throughput(answers: int, concurrency: int, recorded: bool) -> dict[str, Any]:
    """Answers a second from a server that answers at once, and memory before and after nine tenths of them.

    ``cpu_us_per_answer`` is that of this process with all its threads, the ledger's included.
    """
    with running(0.0) as url, _books(recorded) as books, EndpointSession(books) as session:
        config = EndpointConfig(base_url=url, model="bench", max_concurrency=concurrency, n=False, seed=True)
        endpoint = session.endpoint(config)
        warm = max(answers // 10, 1)
        _ask(endpoint, 0, warm)
        before, wall, cpu = _resident_mib(), time.perf_counter(), time.process_time()
        _ask(endpoint, warm, answers)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {
            "ledger": recorded,
            "answers": answers,
            "concurrency": concurrency,
            "answers_per_s": answers / wall,
            "answers_per_cpu_s": answers / cpu,
            "cpu_us_per_answer": 1e6 * cpu / answers,
            "mib_before": before,
            "mib_growth": _resident_mib() - before,
        }


def rollout(latency: float, chains: int, concurrency: int, prompter_seconds: float, rounds: int) -> dict[str, Any]:
    """Seconds of a rollout whose rewrites are finished evenly over the time of the prompter, each sent at once.

    ``least`` is the longer of the prompter's time and the endpoint's at its limit, plus one latency.
    """
    with running(latency) as url, EndpointSession(NoBooks()) as session:
        config = EndpointConfig(base_url=url, model="bench", max_concurrency=concurrency, n=False, seed=True)
        endpoint = session.endpoint(config)
        _ask(endpoint, 0, 8 * concurrency)  # until the limit is found
        seconds = [
            _one_rollout(endpoint, 10**6 * (1 + turn), chains, prompter_seconds / chains) for turn in range(rounds)
        ]
        endpoint_seconds = latency * -(-chains // concurrency)
        most = max(prompter_seconds, endpoint_seconds)
        return {
            "latency": latency,
            "chains": chains,
            "concurrency": concurrency,
            "prompter_s": prompter_seconds,
            "endpoint_s": endpoint_seconds,
            "seconds": seconds,
            "median_s": sorted(seconds)[len(seconds) // 2],
            "least_s": most + latency,
            "goal_s": 1.15 * most + latency,
        }


def _one_rollout(endpoint: Endpoint, first: int, chains: int, pause: float) -> float:
    began = time.perf_counter()
    futures: list[Future[list[Answer]]] = []
    for number in range(chains):
        time.sleep(max(began + (number + 1) * pause - time.perf_counter(), 0))
        futures.append(endpoint.submit(_query(first + number)))
    for future in futures:
        future.result()
    return time.perf_counter() - began
