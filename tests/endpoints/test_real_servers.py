"""A real model behind a real server of another project: vLLM with SmolLM2, which `make test-endpoint` fetches.

Skipped unless the variables VLLM (the program) and SMOLLM2 (the model's directory) say where they are. Tokens are not compared
with those in this process: the server's arithmetic is another one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import alignpro
from alignpro.config import BudgetConfig, EndpointConfig
from alignpro.endpoints.books import LedgerBooks
from alignpro.endpoints.endpoint import Endpoint
from alignpro.endpoints.ledger import Ledger
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Query, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.server]

STARTS_WITHIN = 600
"""Seconds: vLLM loads its own torch and measures the memory first."""
CONTEXT = 256


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program, model = os.environ.get("VLLM"), os.environ.get("SMOLLM2")
    if not program or not model:
        pytest.skip("VLLM and SMOLLM2 do not say where the server and the model are: see `make test-endpoint`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    options = [
        "--served-model-name",
        "smollm2",
        "--max-model-len",
        str(CONTEXT),
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    options += ["--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with log.open("wb") as output:
        server = subprocess.Popen([program, "serve", model, *options], stdout=output, stderr=output, env=environment)
    try:
        _await_health(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def _await_health(server: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(errors="replace")[-4000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(health, timeout=5)
            return
        time.sleep(1)
    pytest.fail(f"the server did not start within {STARTS_WITHIN} s: {log.read_text(errors='replace')[-4000:]}")


@contextlib.contextmanager
def opened(url: str, path: Path) -> Iterator[Endpoint]:
    with Ledger(path) as ledger, EndpointSession(LedgerBooks(ledger, BudgetConfig(), {}, "run")) as session:
        yield session.endpoint(EndpointConfig(base_url=url, model="smollm2"))


def question(temperature: float, *draws: int, text: str = "Name a colour.") -> Query:
    return Query((("user", text),), Sampling(16, temperature), 7, draws)


def test_what_it_supports_is_found(url: str, tmp_path: Path) -> None:
    with opened(url, tmp_path / "ledger.sqlite") as endpoint:
        found = endpoint.preflight(Sampling(16, stop=("never",), top_k=5))
    assert found.n and found.seed and found.reports_usage and found.greedy_repeats
    assert found.model == "smollm2"


def test_draws_differ_and_are_bought_once(url: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with opened(url, path) as endpoint:
        drawn = endpoint.submit(question(1.0, 1, 2, 3, 4)).result()
        greedy = endpoint.submit(question(0.0, 1, 2)).result()
        bought = endpoint.stats.requests
    assert len({answer.text for answer in drawn}) > 1
    assert greedy[0].text == greedy[1].text != ""
    assert {answer.finish_reason for answer in drawn} <= {"stop", "length"}
    with opened(url, path) as endpoint:
        again = endpoint.submit(question(1.0, 4, 3, 2, 1)).result()
        assert endpoint.stats.requests < bought  # no more than what finds out whether it takes n
    assert [answer.text for answer in again] == [answer.text for answer in reversed(drawn)]


def test_a_prompt_beyond_its_context_is_an_outcome(url: str, tmp_path: Path) -> None:
    with opened(url, tmp_path / "ledger.sqlite") as endpoint:
        (answer,) = endpoint.submit(question(1.0, 1, text="word " * 2 * CONTEXT)).result()
    assert answer.finish_reason == "overflow" and answer.text == ""


def test_a_prompter_is_trained_against_it(url: str, tmp_path: Path) -> None:
    """Two steps; evaluating what they were scored on afterwards costs nothing, since a repeated run has the same answers."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Explain {word}."}}\n' for word in ("dns", "tcp", "tls", "udp")))
    config = {
        "run": {"out": str(tmp_path / "run"), "steps": 2},
        "data": {"source": str(prompts), "holdout": 0},
        "policy": {"path": os.environ["SMOLLM2"], "adapter": {"kind": "lora", "rank": 4}},
        "target": {"endpoint": {"base_url": url, "model": "smollm2"}},
        "reward": {"components": [{"kind": "function", "function": f"{__file__}:brevity"}]},
        "prompting": {"max_prompt_tokens": 64},
        "rollout": {
            "prompts_per_step": 2,
            "rewrites_per_prompt": 2,
            "rewrite": {"max_tokens": 12},
            "respond": {"max_tokens": 12},
        },
        "ledger": str(tmp_path / "shared.sqlite"),
    }
    first = alignpro.train(config)
    assert first.metrics[-1]["endpoint/requests"] >= 4
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config | {"run": {"out": str(tmp_path / "again"), "steps": 2}}))
    second = alignpro.train(path)
    assert second.metrics[-1]["endpoint/replayed"] == 4
    assert [row["reward/mean"] for row in first.metrics] == [row["reward/mean"] for row in second.metrics]


def brevity(prompts: list[object], responses: list[str]) -> list[float]:
    """A reward for few letters."""
    return [1 / (1 + len(response)) for response in responses]
