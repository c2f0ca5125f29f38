"""What a server supports, found out by a few small requests before any work is done.

A parameter that is refused, or seen to be ignored, is an error that names it. What cannot be seen from outside is listed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from alignpro.config import EndpointConfig
from alignpro.endpoints.exchange import RefusalError
from alignpro.endpoints.types import Query, Sampling
from alignpro.endpoints.wire import Received, max_tokens_of
from alignpro.errors import EndpointError

MESSAGES = (("user", "Count from one to twenty in words, separated by spaces."),)
TOKENS = 16
SEED = 20011


@dataclass(frozen=True)
class Probe:
    """A request whose answer is only looked at."""

    query: Query
    n: int
    seed: int | None


Ask = Callable[[Probe], Awaitable[Received]]


@dataclass(frozen=True)
class Findings:
    """What a server supports."""

    n: bool
    """It answers one request with n draws."""
    seed: bool
    """It accepts a seed."""
    seed_repeats: bool | None = None
    """The same seed gave the same answer twice; None: not tried."""
    greedy_repeats: bool | None = None
    """So did temperature 0."""
    reports_usage: bool | None = None
    """It says how many tokens an answer took; otherwise its bound is charged."""
    model: str = ""
    """As the server names it."""
    fingerprint: str = ""
    unverified: tuple[str, ...] = ()
    """Parameters whose effect cannot be seen from outside."""


async def examine(config: EndpointConfig, sampling: Sampling, ask: Ask) -> Findings:
    """Ask a server a few small questions.

    Args:
        config: The server.
        sampling: What it will be asked with.
        ask: Sends a probe.

    Raises:
        EndpointError: The server cannot be used, or refuses or ignores a parameter.
    """
    small = replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens), stop=())
    random = replace(small, temperature=sampling.temperature or 1.0)
    probe, received = await _most_that_is_accepted(config, _query(replace(random, stop=sampling.stop)), ask)
    if probe.n > 1 and received.choices != probe.n:
        if config.n:
            raise EndpointError(f"{_who(config)}: `n` is ignored: {received.choices} choices came back for n={probe.n}")
        probe = replace(probe, n=1)
    _check_length(config, probe, received)
    repeated = None
    if probe.seed is not None:
        again = await ask(probe)
        repeated = _texts(again)[:1] == _texts(received)[:1]
    greedy = Probe(_query(replace(small, temperature=0.0)), 1, None)
    first, second = _texts(await ask(greedy)), _texts(await ask(greedy))
    unverified = list(_unverified(config, sampling))
    if sampling.stop and not await _stops(config, greedy, first[0], ask):
        unverified.append("stop")
    answer = next((one for one in received.answers if one is not None), None)
    return Findings(
        n=probe.n > 1,
        seed=probe.seed is not None,
        seed_repeats=repeated,
        greedy_repeats=first == second,
        reports_usage=received.usage is not None,
        model=answer.model if answer else "",
        fingerprint=answer.fingerprint if answer else "",
        unverified=tuple(unverified),
    )


async def confirm(config: EndpointConfig, sampling: Sampling, found: Findings, ask: Ask) -> None:
    """Ask a server that has been examined before one small question: whether it is there and takes the key.

    Args:
        config: The server.
        sampling: What it will be asked with.
        found: What was found of it.
        ask: Sends a probe.

    Raises:
        EndpointError: The server cannot be used.
    """
    small = replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens))
    seed = SEED % (1 << config.seed_bits) if found.seed and sampling.temperature > 0 else None
    await ask(Probe(_query(small), 1, seed))


def _query(sampling: Sampling) -> Query:
    return Query(MESSAGES, sampling, SEED, (SEED,))


def _who(config: EndpointConfig) -> str:
    return f"{config.base_url}, model {config.model}"


async def _most_that_is_accepted(config: EndpointConfig, query: Query, ask: Ask) -> tuple[Probe, Received]:
    """The first of n and seed, seed, n and neither, as far as the configuration leaves it open, that is not refused."""
    seed = SEED % (1 << config.seed_bits)
    ns = {None: (2, 1), True: (2,), False: (1,)}[config.n]
    seeds = {None: (seed, None), True: (seed,), False: (None,)}[config.seed]
    refusal: RefusalError | None = None
    for n in ns:
        for one in seeds:
            probe = Probe(query, n, one)
            try:
                return probe, await ask(probe)
            except RefusalError as error:
                if error.status not in (400, 422):
                    raise
                refusal = refusal or error
    assert refusal is not None
    raise refusal


def _check_length(config: EndpointConfig, probe: Probe, received: Received) -> None:
    """An end token more than was asked for is common."""
    most = probe.n * (max_tokens_of(config, probe.query) + 1)
    if received.usage is not None and received.choices == probe.n and received.usage.output > most:
        raise EndpointError(
            f"{_who(config)}: `max_tokens` is ignored: {received.usage.output} tokens came back, more than {most}"
        )


async def _stops(config: EndpointConfig, greedy: Probe, text: str, ask: Ask) -> bool:
    """Whether it could be seen that an answer ends before a stop string.

    Raises:
        EndpointError: It does not.
    """
    words = text.split()
    if len(words) < 2:
        return False
    end = words[1]
    stopped = _texts(await ask(replace(greedy, query=_query(replace(greedy.query.sampling, stop=(end,))))))
    if end in stopped[0]:
        raise EndpointError(f"{_who(config)}: `stop` is ignored: the answer to stop={end!r} was {stopped[0][:80]!r}")
    return True


def _texts(received: Received) -> list[str]:
    """The texts of the choices; ``""`` for one without."""
    return [one.text if one is not None else "" for one in received.answers] or [""]


def _unverified(config: EndpointConfig, sampling: Sampling) -> Iterator[str]:
    if sampling.temperature > 0:
        yield from ("temperature", "top_p")
        for name, value in (("top_k", sampling.top_k), ("min_p", sampling.min_p)):
            if name not in config.extra_body:
                yield name if value else f"{name} (not sent: the server's default holds)"
    yield from config.extra_body
