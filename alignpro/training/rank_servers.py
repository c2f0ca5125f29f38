"""The servers of a job on several ranks: rank 0 has the ledger, the budget and the limits, and grants what the others ask for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.config import EndpointConfig, SamplingConfig, SpendingConfig
from alignpro.distributed.launcher import rank_zero_address
from alignpro.distributed.ranks import Ranks
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.grants import GrantServer, new_token
from alignpro.endpoints.known_servers import FILE_NAME as KNOWN_FILE
from alignpro.endpoints.known_servers import KnownServers
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.ledger_schema import FILE_NAME
from alignpro.endpoints.limits import RateLimits
from alignpro.endpoints.remote import RankConnection, RemoteBooks, RemoteLimits
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Books, Limits
from alignpro.targets.servers import NO_SERVERS, OpenServers, Servers, job_identity


@dataclass(frozen=True)
class _Job:
    """What the servers of a job are opened with."""

    spending: SpendingConfig
    endpoints: Sequence[EndpointConfig]
    out: Path
    respond: SamplingConfig
    rewards: Sequence[EndpointConfig]


@dataclass(frozen=True)
class _Invitation:
    """How the other ranks reach rank 0, and what it has found of the servers."""

    host: str
    port: int
    token: str
    known: dict[str, Any]


@contextmanager
def open_rank_servers(
    ranks: Ranks,
    spending: SpendingConfig,
    endpoints: Sequence[EndpointConfig],
    out: Path,
    respond: SamplingConfig,
    rewards: Sequence[EndpointConfig] = (),
) -> Iterator[Servers]:
    """Connect all ranks to the servers of a job, which rank 0 checks; entering it is a collective.

    If a server ends for good on one rank, nothing more is sent on any.

    Args:
        ranks: All ranks.
        spending: Budget, prices and ledger.
        endpoints: The targets' servers.
        out: The job's directory, on rank 0.
        respond: How they will be sampled.
        rewards: The servers of rewards, which the rewards open themselves.

    Raises:
        EndpointError: A server cannot be used, or rank 0 cannot be reached.
        BudgetError: The budget does not suffice for the check.
        LedgerError: The ledger cannot be used.
        PeerError: Another rank failed.
    """
    if not (endpoints or rewards):
        yield NO_SERVERS
        return
    job = _Job(spending, endpoints, out, respond, rewards)
    with ExitStack() as stack:
        opened: list[Servers] = []

        def open_first() -> _Invitation:
            servers, invitation = _open_on_rank_zero(job, stack)
            opened.append(servers)
            return invitation

        invitation = ranks.on_rank_zero(open_first)
        with ranks.raise_together():
            if not ranks.is_rank_zero:
                opened.append(_join(job, invitation, stack))
        yield opened[0]


def _open_on_rank_zero(job: _Job, stack: ExitStack) -> tuple[Servers, _Invitation]:
    ledger = stack.enter_context(Ledger(job.spending.ledger or job.out / FILE_NAME))
    books = LedgerBooks(ledger, job.spending.budget, job.spending.prices, job_identity(job.out))
    limits: dict[str, Limits] = {}
    for endpoint in (*job.endpoints, *job.rewards):
        limits.setdefault(_name(endpoint), RateLimits.of(endpoint))
    token = new_token()
    grants = GrantServer(books, limits, token)
    address: list[tuple[str, int]] = []

    @asynccontextmanager
    async def granting() -> AsyncIterator[Books]:
        address.append(await grants.start(rank_zero_address()))
        try:
            yield books
        finally:
            await grants.close()

    known = KnownServers(job.out / KNOWN_FILE)
    session = stack.enter_context(EndpointSession(granting(), lambda endpoint: limits[_name(endpoint)], known=known))

    def tell_failure(reason: str) -> None:
        asyncio.run_coroutine_threadsafe(grants.fail(f"rank 0: {reason}"), session.loop)

    servers = OpenServers(session, job.spending, job.endpoints, job.respond, tell_failure=tell_failure)
    return servers, _Invitation(*address[0], token, known.as_dict())


def _join(job: _Job, invitation: _Invitation, stack: ExitStack) -> Servers:
    connections: list[RankConnection] = []

    @asynccontextmanager
    async def joined() -> AsyncIterator[Books]:
        connection = await RankConnection.connect(invitation.host, invitation.port, invitation.token)
        connections.append(connection)
        try:
            yield RemoteBooks(connection)
        finally:
            await connection.close()

    session = stack.enter_context(
        EndpointSession(joined(), lambda endpoint: RemoteLimits(connections[0], _name(endpoint)))
    )
    session.known.update(invitation.known)

    def tell_failure(reason: str) -> None:
        asyncio.run_coroutine_threadsafe(connections[0].fail(reason), session.loop)

    return OpenServers(session, job.spending, job.endpoints, job.respond, check=False, tell_failure=tell_failure)


def _name(endpoint: EndpointConfig) -> str:
    """Of a server's limits: endpoints with the same URL, key and model share them."""
    return f"{endpoint.base_url} {endpoint.api_key_env} {endpoint.model}"
