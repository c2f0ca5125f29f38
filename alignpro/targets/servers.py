"""The servers of a job: connected to and checked before any model is loaded, with one ledger and one budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from alignpro.config import EndpointConfig, PriceConfig, SamplingConfig, SpendingConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.known_servers import FILE_NAME as KNOWN_FILE
from alignpro.endpoints.known_servers import KnownServers
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.ledger_schema import FILE_NAME
from alignpro.endpoints.preflight import Findings
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Answer, Query, Sampling, Usage
from alignpro.endpoints.wire import request_body, upper_bound
from alignpro.errors import ConfigError, PeerError
from alignpro.targets.connection import AskedSoFar, Connection
from alignpro.targets.server_metrics import added, reward_metrics

logger = logging.getLogger(__name__)

_RUN_ID = "run_id"
"""The file with the identity of a training run, by which its directory is known as one: no other job may write it."""
_JOB_ID = "job_id"
"""Likewise of any other job."""


class Servers(Protocol):
    """The servers of a job."""

    known: KnownServers
    """What was found of them."""

    def connect(self, config: EndpointConfig) -> Connection:
        """The connection to a target's server, which has been checked."""

    def endpoint(self, config: EndpointConfig, path: str | None = None) -> Endpoint:
        """Open the server of a reward; see `EndpointSession.endpoint`."""

    def reward_metrics(self) -> dict[str, float]:
        """What the servers of rewards were asked since the last call, as metrics of a step; nothing without such servers."""


class NoServers:
    """Of a job that asks none."""

    def __init__(self) -> None:
        self.known = KnownServers()

    def connect(self, config: EndpointConfig) -> Connection:
        """Never called: a job with an endpoint has servers."""
        raise LookupError(f"{config.base_url}: is not one of the job's servers")

    def endpoint(self, config: EndpointConfig, path: str | None = None) -> Endpoint:
        """Raise: nothing here connects to a server.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{config.base_url}: a reward asks a server, and nothing here connects to one: train or evaluate by "
            "alignpro.train or alignpro.evaluate, or build the trainer with open servers"
        )

    def reward_metrics(self) -> dict[str, float]:
        """Nothing: there are none."""
        return {}


NO_SERVERS = NoServers()


@contextmanager
def open_servers(
    spending: SpendingConfig,
    endpoints: Sequence[EndpointConfig],
    out: Path,
    respond: SamplingConfig,
    rewards: Sequence[EndpointConfig] = (),
) -> Iterator[Servers]:
    """Connect to the servers of a job and check each target's with a few small requests, which are paid for.

    What was found is kept in the job's directory: when the job continues, each server gets one request.

    Args:
        spending: Budget, prices and ledger.
        endpoints: The targets' servers.
        out: The job's directory, which has the ledger unless the configuration names another.
        respond: How they will be sampled.
        rewards: The servers of rewards, which the rewards open and check themselves.

    Raises:
        EndpointError: A server cannot be used: its URL, the key, the model, or a parameter that it refuses or ignores.
        BudgetError: The budget does not suffice for the check.
        LedgerError: The ledger cannot be used.
    """
    if not (endpoints or rewards):
        yield NO_SERVERS
        return
    with Ledger(spending.ledger or out / FILE_NAME) as ledger:
        books = LedgerBooks(ledger, spending.budget, spending.prices, job_identity(out))
        with EndpointSession(books, known=KnownServers(out / KNOWN_FILE)) as session:
            yield OpenServers(session, spending, endpoints, respond)


def to_sampling(params: SamplingConfig) -> Sampling:
    """Sampling parameters as a server gets them."""
    return Sampling(params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p, tuple(params.stop))


def job_identity(out: Path) -> str:
    """The identity of the job in a directory, under which its earlier parts paid; made if there is none."""
    path = out / _RUN_ID
    if not path.is_file():
        path = out / _JOB_ID
    if not path.is_file():
        path.write_text(f"{uuid4().hex}\n")
    return path.read_text().strip()


class OpenServers:
    """Servers that are checked when this is made, unless another process has done so.

    Args:
        session: Where they are opened.
        spending: The prices.
        endpoints: The servers.
        respond: How they will be sampled.
        check: Whether they are checked; if not, the session knows what another process has found.
        tell_failure: Called once with what ended a server for good, in a thread of its own.

    Raises:
        EndpointError: As `open_servers`.
        BudgetError: Likewise.
    """

    def __init__(
        self,
        session: EndpointSession,
        spending: SpendingConfig,
        endpoints: Sequence[EndpointConfig],
        respond: SamplingConfig,
        check: bool = True,
        tell_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._session, self.known = session, session.known
        self._prices = spending.prices
        self._of_rewards: list[_EndpointConnection] = []
        self._counted: list[AskedSoFar] = []
        self._connections: list[tuple[EndpointConfig, _EndpointConnection]] = []
        for config in endpoints:
            endpoint = session.endpoint(config)
            if check:
                _report(config, endpoint.preflight(to_sampling(respond)))
            self._connections.append((config, self._connection(endpoint, tell_failure)))

    def connect(self, config: EndpointConfig) -> Connection:
        """The connection to a server."""
        return next(connection for known, connection in self._connections if known == config)

    def endpoint(self, config: EndpointConfig, path: str | None = None) -> Endpoint:
        """Open the server of a reward, and count what it is asked."""
        opened = self._session.endpoint(config, path)
        self._of_rewards.append(self._connection(opened, None))
        self._counted.append(AskedSoFar())
        return opened

    def reward_metrics(self) -> dict[str, float]:
        """What the servers of rewards were asked since the last call."""
        before, self._counted = self._counted, [each.asked() for each in self._of_rewards]
        asked = [now.since(then) for now, then in zip(self._counted, before, strict=True)]
        return reward_metrics(added(*asked)) if asked else {}

    def _connection(self, endpoint: Endpoint, tell_failure: Callable[[str], None] | None) -> _EndpointConnection:
        return _EndpointConnection(endpoint, self._prices.get(endpoint.config.model), tell_failure)


class _EndpointConnection:
    """An endpoint with its price."""

    def __init__(
        self, endpoint: Endpoint, price: PriceConfig | None, tell_failure: Callable[[str], None] | None
    ) -> None:
        self._endpoint, self._price, self._tell_failure = endpoint, price, tell_failure

    def submit(self, query: Query) -> Future[list[Answer]]:
        """Ask; returns at once."""
        answers = self._endpoint.submit(query)
        if self._tell_failure is not None:
            answers.add_done_callback(self._note_failure)
        return answers

    def _note_failure(self, answers: Future[list[Answer]]) -> None:
        error, tell = answers.exception(), self._tell_failure
        if error is not None and tell is not None:
            self._tell_failure = None
            if not isinstance(error, PeerError):  # which repeats what another rank has told
                tell(str(error))

    def asked(self) -> AskedSoFar:
        """What was asked so far, the check included."""
        stats = self._endpoint.stats
        usage = Usage(stats.input_tokens, stats.output_tokens)
        return AskedSoFar(
            requests=stats.requests,
            tokens=usage.total,
            usd=float(self._usd(stats.requests, usage) or 0),
            throttled=stats.throttled,
            retries=stats.retries,
            replayed=stats.replayed,
            concurrency=float(stats.concurrency or 0),
        )

    def describe_most(self, queries: Sequence[Query]) -> str:
        """The most that queries can take."""
        config = self._endpoint.config
        draws = sum(len(query.draws) for query in queries)
        bounds = [upper_bound(config, query, request_body(config, query), len(query.draws)) for query in queries]
        usage = Usage(sum(each.input for each in bounds), sum(each.output for each in bounds))
        usd = self._usd(draws, usage)
        money = "" if usd is None else f" and ${usd:.6f}"
        return f"{draws:,} requests, {usage.total:,} tokens{money}"

    def _usd(self, requests: int, usage: Usage) -> Decimal | None:
        price = self._price
        if price is None:
            return None
        return (usage.input * price.input + usage.output * price.output) / 1_000_000 + requests * price.request


def _report(config: EndpointConfig, found: Findings) -> None:
    """Log what is known of a server, and what is not; warn of what it does otherwise than it should."""
    who = f"{config.model} at {config.base_url}"
    draws = "one request for all draws" if found.n else "one request for each draw"
    seeds = "with seeds" if found.seed else "without seeds: a repeated run gets other answers where the ledger has none"
    logger.info("%s: %s, %s", who, draws, seeds)
    if found.unverified:
        logger.info("%s: cannot be checked from outside: %s", who, ", ".join(found.unverified))
    if found.seed_repeats is False:
        logger.warning(
            "%s: a seed gave two different answers: a repeated run gets other answers where the ledger has none", who
        )
    if found.greedy_repeats is False:
        logger.warning(
            "%s: temperature 0 gave two different answers to one question; the first one that is received is kept for all "
            "who ask it",
            who,
        )
    if found.reports_usage is False:
        logger.warning("%s: does not say how many tokens an answer took: each is charged at its bound", who)
