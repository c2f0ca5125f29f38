"""Servers of a job on several ranks: checked once, one ledger and one budget for all, and a failure that stops all."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server_faults import Fault, always
from thread_ranks import Outcome, results, run_ranks
from tiny_server import TinyServer

from alignpro.config import EndpointConfig, SamplingConfig, SpendingConfig
from alignpro.distributed.ranks import Ranks
from alignpro.endpoints.types import Query, Sampling
from alignpro.errors import BudgetError, EndpointError, PeerError
from alignpro.training.rank_servers import open_rank_servers

RANKS = 3


def query(text: str, seed: int) -> Query:
    return Query((("user", text),), Sampling(max_tokens=4), seed, (seed * 10 + 1, seed * 10 + 2))


def ask_on_ranks(server: Server, out: Path, queries: int = 4, **spending: Any) -> list[Outcome]:
    """Each rank asks some queries of its own; the others leave before rank 0 does, since threads run one at a time."""

    def work(ranks: Ranks) -> list[list[str]]:
        config = EndpointConfig(base_url=server.url, model="tiny", max_retries=0)
        with ExitStack() as stack:
            opened = open_rank_servers(ranks, SpendingConfig(**spending), [config], out, SamplingConfig())
            servers = stack.enter_context(opened)
            connection = servers.connect(config)
            server.ready(ranks)
            try:
                with ranks.raise_together():
                    asked = [connection.submit(query(f"{ranks.rank}/{i}", i + 1)) for i in range(queries)]
                    texts = [[answer.text for answer in each.result(30)] for each in asked]
            finally:
                if not ranks.is_rank_zero:
                    stack.close()
                ranks.barrier()
            return texts

    return run_ranks(RANKS, work)


class Server(TinyServer):
    """A server that can change once all ranks are connected."""

    after: Any = None

    def ready(self, ranks: Ranks) -> None:
        ranks.barrier()
        if ranks.is_rank_zero and self.after is not None:
            self.faults = self.after
        ranks.barrier()


def probes(server: TinyServer) -> int:
    return sum("one to twenty" in str(request.json) for request in server.requests)


def test_ranks_share_one_ledger_and_a_server_is_checked_once(tmp_path: Path) -> None:
    with Server() as server:
        first = results(ask_on_ranks(server, tmp_path))
        sent, checks = len(server.requests), probes(server)
        assert sent == checks + RANKS * 4  # a request for both draws of a query
        assert results(ask_on_ranks(server, tmp_path)) == first
        assert len(server.requests) - sent == probes(server) - checks == 1  # it is there: what it takes is known


def test_a_budget_holds_for_all_ranks_together(tmp_path: Path) -> None:
    with Server() as server:
        outcomes = ask_on_ranks(server, tmp_path, budget={"requests": 10})
        assert len(server.requests) <= 10
    errors = [outcome.error for outcome in outcomes]
    assert all(isinstance(error, BudgetError | PeerError) for error in errors)
    assert any(isinstance(error, BudgetError) for error in errors)


@pytest.mark.parametrize("status", [403])
def test_a_server_that_fails_on_one_rank_stops_all(status: int, tmp_path: Path) -> None:
    with Server() as server:
        server.after = always(Fault("status", status))
        outcomes = ask_on_ranks(server, tmp_path, queries=2)
    errors = [outcome.error for outcome in outcomes]
    assert all(isinstance(error, EndpointError | PeerError) for error in errors)
    assert any(isinstance(error, EndpointError) for error in errors)


def test_a_server_that_cannot_be_used_is_told_by_rank_zero(tmp_path: Path) -> None:
    with Server(key="another") as server:
        outcomes = ask_on_ranks(server, tmp_path)
    assert isinstance(outcomes[0].error, EndpointError)
    assert all(isinstance(outcome.error, PeerError) for outcome in outcomes[1:])
