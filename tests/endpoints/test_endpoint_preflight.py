"""What a server supports is found out once; what it refuses or ignores is an error that names it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from memory_books import MemoryBooks
from tenacity import wait_none
from tiny_server import Choice, TinyServer, some_words

from alignpro.config import EndpointConfig
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Query, Sampling
from alignpro.errors import BudgetError, EndpointError

SAMPLING = Sampling(max_tokens=8, top_k=5, stop=("never",))
QUERY = Query((("user", "hello"),), SAMPLING, 9, (1, 2))


@contextmanager
def opened(server: TinyServer, books: MemoryBooks | None = None, **config: Any) -> Iterator[Endpoint]:
    with server, EndpointSession(books or MemoryBooks(), backoff=wait_none()) as session:
        yield session.endpoint(EndpointConfig(base_url=server.url, model="tiny", **config))


def refusal(server: TinyServer, **config: Any) -> str:
    with opened(server, MemoryBooks(is_bounded=False), **config) as endpoint, pytest.raises(EndpointError) as raised:
        endpoint.preflight(SAMPLING)
    assert server.url in str(raised.value) and "tiny" in str(raised.value)
    return str(raised.value)


def words(request: Mapping[str, Any], seed: int | None, index: int) -> Choice:
    """Always several words, so that a stop string can be tried."""
    return replace(some_words(request, seed, index), text=_stopped("one two three four", request), tokens=4)


def _stopped(text: str, request: Mapping[str, Any]) -> str:
    for end in request.get("stop") or []:
        text = text.split(end)[0]
    return text


def test_it_finds_what_the_server_supports_and_pays_for_it() -> None:
    books = MemoryBooks()
    with opened(server := TinyServer(complete=words), books) as endpoint:
        found = endpoint.preflight(SAMPLING)
        assert found.n and found.seed and found.seed_repeats and found.greedy_repeats and found.reports_usage
        assert (found.model, found.fingerprint) == ("tiny", "fp_tiny")
        assert found.unverified == ("temperature", "top_p", "top_k", "min_p (not sent: the server's default holds)")
        assert {request.json["max_tokens"] for request in server.requests} == {8}
        count = server.count
        assert count == 5 and books.ended == {"settled": 5} and not books.answers
        endpoint.preflight(SAMPLING)
        endpoint.submit(QUERY).result()
        assert server.count == count + 1 and server.requests[-1].json["n"] == 2
    books.check()


def test_it_is_asked_by_the_first_query_if_the_configuration_leaves_something_open() -> None:
    with opened(server := TinyServer(honours_n=False)) as endpoint:
        futures = [endpoint.submit(replace(QUERY, seed=seed, draws=(seed, seed + 1))) for seed in (10, 20)]
        assert all(len(future.result()) == 2 for future in futures)
        queries = [request.json for request in server.requests if request.json["messages"][0]["content"] == "hello"]
        assert sorted(request["seed"] for request in queries) == [10, 11, 20, 21]
        assert not any("n" in request for request in queries)


@pytest.mark.parametrize(
    "refused, n, seed", [(["n"], False, True), (["seed"], True, False), (["n", "seed"], False, False)]
)
def test_n_and_seed_may_be_refused(refused: list[str], n: bool, seed: bool) -> None:
    with opened(server := TinyServer(refused=refused)) as endpoint:
        found = endpoint.preflight(SAMPLING)
        assert (found.n, found.seed) == (n, seed)
        assert len(endpoint.submit(QUERY).result()) == 2
        assert ("n" in server.requests[-1].json, "seed" in server.requests[-1].json) == (n, seed)


def test_what_the_configuration_demands_must_be_accepted() -> None:
    assert "'n'" in refusal(TinyServer(refused=["n"]), n=True)
    assert "'seed'" in refusal(TinyServer(refused=["seed"]), seed=True)
    assert "`n` is ignored: 1 choices came back for n=2" in refusal(TinyServer(honours_n=False), n=True)


def test_refused_and_ignored_parameters_are_named() -> None:
    assert "'top_k'" in refusal(TinyServer(refused=["top_k"]))
    assert "'max_tokens'" in refusal(TinyServer(refused=["max_tokens"]))
    assert "`max_tokens` is ignored: 60 tokens" in refusal(TinyServer(complete=lambda *_: Choice("long", tokens=30)))
    ignores_stop = TinyServer(complete=lambda *_: Choice("one two three", tokens=3))
    assert "`stop` is ignored" in refusal(ignores_stop)


def test_a_wrong_key_or_model_or_server_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", "wrong")
    message = refusal(TinyServer(key="right"), api_key_env="TINY_KEY")
    assert "answered 401" in message and "$TINY_KEY" in message and "wrong" not in message
    message = refusal(TinyServer(model="other"))
    assert "answered 404" in message and "`tiny` does not exist" in message and "check base_url and model" in message
    assert "no connection" in _down()


def _down() -> str:
    with TinyServer() as server:
        pass
    with EndpointSession(MemoryBooks(), backoff=wait_none()) as session:
        endpoint = session.endpoint(EndpointConfig(base_url=server.url, model="tiny", max_retries=1))
        with pytest.raises(EndpointError) as raised:
            endpoint.preflight(SAMPLING)
    return str(raised.value)


def test_it_obeys_the_budget() -> None:
    with opened(TinyServer(), MemoryBooks(most_requests=1)) as endpoint, pytest.raises(BudgetError):
        endpoint.preflight(SAMPLING)
