"""SmolLM2 behind servers of other projects: draws, seeds, stop texts, what does not fit, a training run, and its continuation.

Tokens are not compared with those in this process: the servers' arithmetic is another one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_servers import CONTEXT, SERVERS, RealServer

import alignpro
from alignpro.config import BudgetConfig, EndpointConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Query, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with SERVERS[request.param](tmp_path_factory.mktemp("server")) as running:
        yield running


@contextlib.contextmanager
def opened(server: RealServer, path: Path) -> Iterator[Endpoint]:
    with Ledger(path) as ledger, EndpointSession(LedgerBooks(ledger, BudgetConfig(), {}, "run")) as session:
        yield session.endpoint(EndpointConfig(**server.endpoint))


def question(temperature: float, *draws: int, text: str = "Name a colour.", **sampling: Any) -> Query:
    return Query((("user", text),), Sampling(16, temperature, **sampling), 7, draws)


def test_what_it_supports_is_found(server: RealServer, tmp_path: Path) -> None:
    with opened(server, tmp_path / "ledger.sqlite") as endpoint:
        found = endpoint.preflight(Sampling(16, stop=("never",), top_k=5))
    assert found.n == server.takes_n and found.seed and found.reports_usage and found.greedy_repeats
    assert found.model == "smollm2"
    assert "stop" not in found.unverified


def test_draws_differ_and_are_bought_once(server: RealServer, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with opened(server, path) as endpoint:
        drawn = endpoint.submit(question(1.0, 1, 2, 3, 4)).result()
        greedy = endpoint.submit(question(0.0, 1, 2)).result()
        bought = endpoint.stats.requests
    assert len({answer.text for answer in drawn}) > 1
    assert greedy[0].text == greedy[1].text != ""
    assert {answer.finish_reason for answer in drawn} <= {"stop", "length"}
    with opened(server, path) as endpoint:
        again = endpoint.submit(question(1.0, 4, 3, 2, 1)).result()
        assert endpoint.stats.requests < bought  # no more than what finds out whether it takes n
    assert [answer.text for answer in again] == [answer.text for answer in reversed(drawn)]


def test_a_seed_repeats_its_answer(server: RealServer, tmp_path: Path) -> None:
    texts = []
    for ledger in ("first", "second"):
        with opened(server, tmp_path / ledger) as endpoint:
            texts.append([endpoint.submit(question(1.0, draw)).result()[0].text for draw in (1, 2, 3)])
    assert texts[0] == texts[1]


def test_an_answer_ends_before_a_stop_text(server: RealServer, tmp_path: Path) -> None:
    with opened(server, tmp_path / "ledger.sqlite") as endpoint:
        (whole,) = endpoint.submit(question(0.0, 1, text="Count from one to ten.")).result()
        end = whole.text.split()[2]
        (short,) = endpoint.submit(question(0.0, 1, text="Count from one to ten.", stop=(end,))).result()
    assert short.text == whole.text.split(end)[0] and short.finish_reason == "stop"


def test_a_prompt_beyond_its_context_is_an_outcome(server: RealServer, tmp_path: Path) -> None:
    with opened(server, tmp_path / "ledger.sqlite") as endpoint:
        (answer,) = endpoint.submit(question(1.0, 1, text="word " * 2 * CONTEXT)).result()
    assert answer.finish_reason == "overflow" and answer.text == ""


@pytest.fixture
def config(server: RealServer, tmp_path: Path) -> dict[str, Any]:
    """Of a training run against the server."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Explain {word}."}}\n' for word in ("dns", "tcp", "tls", "udp")))
    return {
        "run": {"out": str(tmp_path / "run"), "steps": 2, "checkpoint_every": 1},
        "data": {"source": str(prompts), "holdout": 0},
        "policy": {"path": os.environ["SMOLLM2"], "adapter": {"kind": "lora", "rank": 4}},
        "target": {"endpoint": server.endpoint},
        "reward": {"components": [{"kind": "function", "function": f"{__file__}:brevity"}]},
        "prompting": {"max_prompt_tokens": 64},
        "rollout": {
            "prompts_per_step": 2,
            "rewrites_per_prompt": 2,
            "responses_per_rewrite": 2,
            "rewrite": {"max_tokens": 12},
            "respond": {"max_tokens": 12},
        },
        "ledger": str(tmp_path / "shared.sqlite"),
    }


def test_a_prompter_is_trained_against_it(server: RealServer, config: dict[str, Any], tmp_path: Path) -> None:
    """A run that is repeated with its ledger pays nothing, and one that is resumed pays for its new steps alone."""
    rows = alignpro.train(config).metrics
    requests = 4 if server.takes_n else 8
    assert rows[-1]["endpoint/requests"] == requests
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config | {"run": {**config["run"], "out": str(tmp_path / "again")}}))
    second = alignpro.train(path)
    assert second.metrics[-1]["endpoint/replayed"] == 8 and second.metrics[-1]["endpoint/requests"] == 0
    assert [row["reward/mean"] for row in second.metrics] == [row["reward/mean"] for row in rows]
    longer = alignpro.train(config | {"run": {**config["run"], "steps": 3}}, resume=True)
    assert [row["step"] for row in longer.metrics] == [1, 2, 3]
    assert longer.metrics[:2] == rows
    assert longer.metrics[-1]["endpoint/requests"] >= requests


def brevity(prompts: list[object], responses: list[str]) -> list[float]:
    """A reward for few letters."""
    return [1 / (1 + len(response)) for response in responses]
