"""An endpoint answers queries: what is sent, what is recorded, what ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from memory_books import MemoryBooks
from server_faults import Fault, at, randomly, throttled
from tenacity import wait_none
from tiny_server import Choice, TinyServer

from alignpro.config import EndpointConfig
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Answer, Query, Sampling
from alignpro.errors import AlignProError, BudgetError, EndpointError

SAMPLING = Sampling(max_tokens=8)
KNOWN: dict[str, Any] = {"n": True, "seed": True}
"""A server that need not be asked what it supports."""


def query(number: int, draws: int = 3, sampling: Sampling = SAMPLING) -> Query:
    first = 1000 * number
    return Query((("user", f"flip word {number}"),), sampling, first, tuple(range(first + 1, first + 1 + draws)))


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


@contextmanager
def opened(server: TinyServer, books: MemoryBooks | None = None, **config: Any) -> Iterator[Endpoint]:
    books = books or MemoryBooks()
    with EndpointSession(books, backoff=wait_none()) as session:
        yield session.endpoint(EndpointConfig(base_url=server.url, model="tiny", **config))
    books.check()


def test_one_request_answers_all_draws_where_the_server_supports_n() -> None:
    with TinyServer() as server, opened(server, **KNOWN) as endpoint:
        answers = endpoint.submit(query(1)).result()
        assert [(request.json["n"], request.json["seed"]) for request in server.requests] == [(3, 1000)]
        expected = [server.complete(server.requests[0].json, 1000, index).text for index in range(3)]
        assert texts(answers) == expected
        assert {(one.model, one.fingerprint, one.replayed) for one in answers} == {("tiny", "fp_tiny", False)}


def test_each_draw_is_a_request_with_its_own_seed_where_it_does_not() -> None:
    with TinyServer() as server, opened(server, n=False, seed=True, seed_bits=10) as endpoint:
        answers = endpoint.submit(query(2)).result()
        assert sorted(request.json["seed"] for request in server.requests) == [2001 % 1024, 2002 % 1024, 2003 % 1024]
        assert not any("n" in request.json for request in server.requests)
        request = server.requests[0].json
        assert texts(answers) == [server.complete(request, seed % 1024, 0).text for seed in (2001, 2002, 2003)]


def test_at_temperature_0_one_request_answers_all_draws_of_all_who_ask() -> None:
    greedy = Sampling(max_tokens=8, temperature=0.0)
    with TinyServer(latency=0.05) as server, opened(server, **KNOWN) as endpoint:
        futures = [endpoint.submit(Query(query(3).messages, greedy, seed, (seed, seed + 1))) for seed in (1, 9)]
        first, second = (texts(future.result()) for future in futures)
        assert first == second and len(set(first)) == 1
        assert server.count == 1 and "seed" not in server.requests[0].json


def test_what_the_books_hold_is_not_asked_again_and_the_rest_is_asked_singly() -> None:
    books = MemoryBooks()
    with TinyServer() as server:
        with opened(server, books, **KNOWN) as endpoint:
            before = endpoint.submit(query(4)).result()
        with opened(server, books, **KNOWN) as endpoint:
            again = endpoint.submit(query(4)).result()
            assert texts(again) == texts(before) and all(one.replayed for one in again)
            assert endpoint.stats.replayed == 3 and endpoint.stats.requests == 0
        lost = next(key for key in books.answers if key.draw == 4002)
        del books.answers[lost], books.bought[lost]
        with opened(server, books, **KNOWN) as endpoint:
            partly = endpoint.submit(query(4)).result()
        assert server.count == 2 and server.requests[1].json["seed"] == 4002
        assert [one.replayed for one in partly] == [True, False, True]


def test_completions_send_the_last_turn_as_text() -> None:
    with TinyServer() as server, opened(server, api="completions", **KNOWN) as endpoint:
        assert all(texts(endpoint.submit(query(5)).result()))
        received = server.requests[0]
        assert received.path == "/v1/completions" and received.json["prompt"] == "flip word 5"


@pytest.mark.parametrize("config, queries", [(KNOWN, 60), ({"n": False, "seed": True}, 20)])
def test_with_a_fifth_of_all_requests_failing_the_answers_are_those_without_failures(
    config: dict[str, Any], queries: int
) -> None:
    def run(server: TinyServer) -> list[list[str]]:
        books = MemoryBooks()
        with server, opened(server, books, max_failures=1000, **config) as endpoint:
            futures = [endpoint.submit(query(number)) for number in range(queries)]
            answers = [texts(future.result()) for future in futures]
            stats = endpoint.stats
        assert (stats.retries > 5) == (server.faults is not None)
        assert stats.retries == stats.throttled + stats.server_errors == len(books.reasons)
        assert stats.requests == server.count == books.count
        return answers

    assert run(TinyServer(faults=randomly(0.2, seed=1))) == run(TinyServer())


@pytest.mark.parametrize(
    "fault, ended",
    [
        (throttled(retry_after="0.01"), "refunded"),
        (throttled(), "refunded"),
        (Fault("status", 408), "refunded"),
        (Fault("status", 503, {"retry-after": "0.01"}), "refunded"),
        (Fault("status", 503), "written off"),
        (Fault("status", 500), "written off"),
        (Fault("status", 502, body=b"<html>Bad gateway</html>"), "written off"),
        (Fault("reset_before"), "written off"),
        (Fault("reset_after"), "written off"),
        (Fault("reset_inside"), "written off"),
        (Fault("truncated"), "written off"),
        (Fault("invalid"), "written off"),
        (Fault("short"), "written off"),
        (Fault("stall", seconds=5), "written off"),
        (Fault("body", body=b""), "written off"),
        (Fault("body", body=b"[]"), "written off"),
        (Fault("body", body=b'{"choices": []}'), "written off"),
        (Fault("body", body=b'{"error": {"message": "upstream is busy", "code": 429}}'), "refunded"),
        (Fault("body", body=b'{"error": {"message": "upstream broke"}}'), "written off"),
    ],
    ids=lambda value: f"{value.kind} {value.status}" if isinstance(value, Fault) else value,
)
def test_a_failure_that_passes_is_repeated_and_ends_its_purchase_once(fault: Fault, ended: str) -> None:
    books = MemoryBooks()
    with TinyServer(faults=at({0: fault})) as server, opened(server, books, timeout_seconds=0.5, **KNOWN) as endpoint:
        expected = [server.complete({"messages": [{"role": "user", "content": "flip word 6"}]}, 6000, 0).text]
        assert texts(endpoint.submit(query(6, draws=2)).result())[:1] == [" ".join(expected[0].split()[:8])]
        assert endpoint.stats.retries == 1
    assert books.ended == {ended: 1, "settled": 1} and server.count == 2


@pytest.mark.parametrize(
    "headers",
    [
        {"retry_after": "0.15"},
        {"retry_after_ms": "150"},
        {"x_ratelimit_reset_tokens": "150ms"},
        {"retry_after": "0.15", "x_ratelimit_reset_requests": "3h"},
    ],
)
def test_a_server_is_left_alone_for_as_long_as_it_asks_in_whatever_form(headers: dict[str, str]) -> None:
    with TinyServer(faults=at({0: throttled(**headers)})) as server, opened(server, **KNOWN) as endpoint:
        began = time.monotonic()
        assert all(texts(endpoint.submit(query(1)).result()))
        assert 0.15 <= time.monotonic() - began < 2 and server.count == 2


def test_a_slow_answer_is_an_answer() -> None:
    with TinyServer(faults=at({0: Fault("slow", seconds=0.01)})) as server, opened(server, **KNOWN) as endpoint:
        assert all(texts(endpoint.submit(query(7)).result())) and server.count == 1


def test_no_server_is_one_message_and_costs_nothing() -> None:
    books = MemoryBooks()
    with TinyServer() as server:
        pass
    with opened(server, books, max_retries=2, **KNOWN) as endpoint:
        problem = endpoint.submit(query(8)).exception()
        assert isinstance(problem, EndpointError)
        assert f"{server.url}, model tiny: no connection" in str(problem) and "tried 3 times" in str(problem)
    assert books.ended == {"refunded": 3}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301, 308])
def test_a_refusal_ends_all_that_wait_with_the_same_error_at_once(status: int) -> None:
    books = MemoryBooks()
    elsewhere = "https://elsewhere.example/v1/chat/completions"
    plan = {number: Fault("status", status, {"location": elsewhere}) for number in range(1, 100)}
    with (
        TinyServer(faults=at(plan), latency=0.02) as server,
        opened(server, books, max_concurrency=1, **KNOWN) as endpoint,
    ):
        futures = [endpoint.submit(query(number)) for number in range(9)]
        assert all(texts(futures[0].result()))
        errors = [future.exception() for future in futures[1:]] + [endpoint.submit(query(10)).exception()]
        assert isinstance(errors[0], EndpointError) and all(error is errors[0] for error in errors)
        assert f"{server.url}, model tiny: the server answered {status}: " in str(errors[0])
        assert f"made to answer {status}" in str(errors[0])
        assert (elsewhere in str(errors[0])) == (status < 400)
    assert server.count == 2 and books.ended == {"settled": 1, "refunded": 1}


def test_an_account_without_money_is_not_asked_again() -> None:
    body = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    with TinyServer(faults=at({0: Fault("status", 429, body=body)})) as server, opened(server, **KNOWN) as endpoint:
        assert "You exceeded your current quota" in str(endpoint.submit(query(1)).exception())
        assert server.count == 1


def test_failures_in_a_row_end_it_with_the_last_cause() -> None:
    with TinyServer(faults=lambda *_: Fault("status", 500)) as server:
        with opened(server, max_failures=4, max_retries=100, **KNOWN) as endpoint:
            problem = str(endpoint.submit(query(1)).exception())
        assert "4 failures in a row; the last: the server answered 500: " in problem and server.count == 4


def test_failures_that_were_in_flight_together_count_once() -> None:
    plan = {number: Fault("reset_before") for number in range(8)}
    with TinyServer(faults=at(plan), latency=0.05) as server, opened(server, max_failures=3, **KNOWN) as endpoint:
        assert all(future.result() for future in [endpoint.submit(query(number)) for number in range(8)])


def test_beyond_the_budget_nothing_is_sent_and_what_is_in_flight_is_kept() -> None:
    books = MemoryBooks(most_requests=5)
    with TinyServer(latency=0.2) as server, opened(server, books, **KNOWN) as endpoint:
        futures = [endpoint.submit(query(number)) for number in range(9)]
        errors = [future.exception() for future in futures]
        assert all(isinstance(error, BudgetError) for error in errors)
        assert isinstance(endpoint.submit(query(9)).exception(), BudgetError)
    assert server.count == 5 and books.ended == {"settled": 5} and len(books.answers) == 15


@pytest.mark.parametrize(
    "body, outcome",
    [
        (b'{"error": {"message": "too long", "code": "context_length_exceeded"}}', "overflow"),
        (
            b'{"error": {"code": 400, "message": "the request exceeds it", "type": "exceed_context_size_error"}}',
            "overflow",
        ),
        (
            b'{"object": "error", "message": "This model\'s maximum context length is 64 tokens.", "code": 400}',
            "overflow",
        ),
        (b'{"error": {"message": "The response was filtered", "code": "content_filter"}}', "filtered"),
    ],
)
def test_a_refusal_that_depends_on_the_text_is_an_outcome(body: bytes, outcome: str) -> None:
    books = MemoryBooks()
    fault = Fault("status", 400, body=body)
    with TinyServer(faults=at({0: fault})) as server, opened(server, books, **KNOWN) as endpoint:
        answers = endpoint.submit(query(1)).result()
        assert [(one.finish_reason, one.text) for one in answers] == [(outcome, "")] * 3
        assert getattr(endpoint.stats, outcome) == 3
        assert all(texts(endpoint.submit(query(2)).result()))
    assert books.ended == {"settled": 2}


def test_fewer_choices_than_asked_is_one_message_and_what_came_is_kept() -> None:
    books = MemoryBooks()
    with TinyServer(honours_n=False) as server, opened(server, books, **KNOWN) as endpoint:
        problem = str(endpoint.submit(query(1)).exception())
    assert "1 choices came back for n=3" in problem and "set n: false" in problem
    assert [key.draw for key in books.answers] == [1001]


def test_a_choice_without_text_is_asked_again() -> None:
    def complete(request: Any, seed: int | None, index: int) -> Choice:
        is_first = request.get("n") == 3
        return Choice("good", "error" if is_first and index == 1 else "stop")

    with TinyServer(complete=complete) as server, opened(server, **KNOWN) as endpoint:
        assert texts(endpoint.submit(query(1)).result()) == ["good"] * 3
        assert [request.json["seed"] for request in server.requests] == [1000, 1002]


def test_an_answer_that_is_too_long_is_not_read() -> None:
    server = TinyServer(complete=lambda *_: Choice("x" * 100_000))
    with server, opened(server, max_answer_bytes=50_000, max_retries=0, **KNOWN) as endpoint:
        assert "longer than max_answer_bytes=50000" in str(endpoint.submit(query(1)).exception())


def test_reasoning_is_kept_apart() -> None:
    with (
        TinyServer(complete=lambda *_: Choice("42", reasoning="let me see")) as server,
        opened(server, **KNOWN) as endpoint,
    ):
        answer = endpoint.submit(query(1, draws=1)).result()[0]
    assert (answer.text, answer.reasoning) == ("42", "let me see")


def test_a_change_of_the_model_that_answers_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with TinyServer() as server, opened(server, **KNOWN) as endpoint:
        endpoint.submit(query(1)).result()
        server.fingerprint = "fp_other"
        endpoint.submit(query(2)).result()
        endpoint.submit(query(3)).result()
        assert endpoint.served == {("tiny", "fp_tiny"): 3, ("tiny", "fp_other"): 6}
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "'fp_other'" in warnings[0] and "rewards may have moved" in warnings[0]


def test_closing_writes_off_what_does_not_come_back_and_fails_what_waits() -> None:
    books = MemoryBooks()
    with TinyServer(faults=lambda *_: Fault("stall")) as server:
        session = EndpointSession(books)
        endpoint = session.endpoint(EndpointConfig(base_url=server.url, model="tiny", max_concurrency=4, **KNOWN))
        futures = [endpoint.submit(query(number)) for number in range(9)]
        while server.count < 4:
            time.sleep(0.01)
        session.close(grace_seconds=0.1)
        assert all("closed" in str(future.exception()) for future in futures)
    assert books.ended == {"written off": 4}
    books.check()
    assert not [thread for thread in threading.enumerate() if thread.name == "endpoints"]
    with pytest.raises(EndpointError, match="session was closed"):
        session.endpoint(endpoint.config)


@pytest.mark.parametrize(("raised", "ended"), [(EndpointError("401"), "settled"), (KeyboardInterrupt(), "written off")])
def test_answers_in_flight_are_awaited_for_longer_after_an_error(
    raised: BaseException, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are paid for, and a run that goes on finds them."""
    monkeypatch.setattr("alignpro.endpoints.session.GRACE_SECONDS", 0.05)
    books = MemoryBooks()
    with TinyServer(latency=0.5) as server, pytest.raises(type(raised)), opened(server, books, **KNOWN) as endpoint:
        endpoint.submit(query(1))
        while not server.count:
            time.sleep(0.01)
        raise raised
    assert books.ended == {ended: 1}


def test_closing_keeps_what_comes_back_in_time() -> None:
    books = MemoryBooks()
    with (
        TinyServer(latency=0.2) as server,
        pytest.raises(KeyboardInterrupt),
        opened(server, books, **KNOWN) as endpoint,
    ):
        endpoint.submit(query(1))
        while not server.count:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert books.ended == {"settled": 1} and len(books.answers) == 3


def test_endpoints_of_one_server_and_key_share_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "some secret")
    with TinyServer(latency=0.02) as server, EndpointSession(MemoryBooks()) as session:
        config = EndpointConfig(base_url=server.url, model="tiny", max_concurrency=2, **KNOWN)
        endpoints = [session.endpoint(config), session.endpoint(config)]
        futures = [endpoint.submit(query(number)) for endpoint in endpoints for number in range(6)]
        assert len([future.result() for future in futures]) == 12
        assert server.most_in_flight == 2
        other = session.endpoint(config.model_copy(update={"api_key_env": "SOME_KEY"}))
        assert other._sender._limits is not endpoints[0]._sender._limits


def test_missing_certificates_and_variables_are_named(tmp_path: Path) -> None:
    with EndpointSession(MemoryBooks()) as session:
        for changes, words in (
            ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE, named by api_key_env, is not set"),
            ({"extra_headers": {"api-key": "env:NOT_SET_ANYWHERE"}}, "named by extra_headers.api-key"),
            ({"ca_bundle": tmp_path / "none.pem"}, "none.pem cannot be read"),
            ({"proxy": "ftp://proxy"}, "proxy: expected http"),
        ):
            with pytest.raises(AlignProError, match=words):
                session.endpoint(EndpointConfig(base_url="https://api.example/v1", model="m", **changes))
