"""Servers are examined once in the life of a job, and each step's metrics count what was asked in it, by rewards too."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedConnection
from tiny_server import Choice, TinyServer, some_words

from alignpro.config import (
    BudgetConfig,
    EndpointConfig,
    PriceConfig,
    RewardConfig,
    SamplingConfig,
    SpendingConfig,
    TargetEndpointConfig,
)
from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.endpoints.known_servers import FILE_NAME, KnownServers
from alignpro.engine import Engine, SamplingParams
from alignpro.rewards import build_reward
from alignpro.rewards.preflight import check_servers
from alignpro.targets.remote import RemoteTarget
from alignpro.targets.servers import NO_SERVERS, job_identity, open_servers
from alignpro.training.run_directory import refuse_run
from alignpro.training.step_metrics import StepMetrics

PROMPTS = [Prompt.from_text(text) for text in ("one", "two", "three")]
SPENDING = SpendingConfig(prices={"tiny": PriceConfig(input=0, output=0, request="0.5")}, budget=BudgetConfig())


def graded(request: Any, seed: int | None, index: int) -> Choice:
    return Choice("Score: 5", tokens=4)


def judge(server: TinyServer) -> RewardConfig:
    component = {"kind": "judge", "endpoint": {"base_url": server.url, "model": "tiny"}, "max_tokens": 8}
    return RewardConfig(components=[component])


def test_a_job_that_continues_sends_one_request_to_a_server_that_it_knows(tmp_path: Path) -> None:
    with TinyServer(key="sk-secret") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_KEY", "sk-secret")
        config = EndpointConfig(base_url=server.url, model="tiny", api_key_env="TINY_KEY")

        def sent(**changes: Any) -> int:
            before = server.count
            settings = config.model_copy(update=changes)
            with open_servers(SPENDING, [settings], tmp_path, SamplingConfig(max_tokens=8)) as servers:
                servers.connect(settings)
            return server.count - before

        first = sent()
        assert first > 1
        assert sent() == 1
        assert sent(max_concurrency=2, timeout_seconds=9.0) == 1
        assert sent(extra_body={"reasoning_effort": "low"}) == first  # may be refused
        written = (tmp_path / FILE_NAME).read_text()
        assert server.url not in written and "sk-secret" not in written
        (tmp_path / FILE_NAME).write_text("{")
        assert sent() == first


def test_what_a_server_does_otherwise_than_it_should_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def anything(request: Any, seed: int | None, index: int) -> Choice:
        return Choice(f"{next(numbers)} words", tokens=2)

    numbers = count()
    for complete in (some_words, anything):
        with TinyServer(complete) as server:
            config = EndpointConfig(base_url=server.url, model="tiny")
            with open_servers(SPENDING, [config], tmp_path, SamplingConfig(max_tokens=8)):
                pass
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(told) == (0 if complete is some_words else 2)
    assert "a seed gave two different answers" in told[0] and "temperature 0 gave two different answers" in told[1]
    assert all(f"tiny at {server.url}: " in each for each in told)


def test_what_was_found_is_taken_over_whole(tmp_path: Path) -> None:
    with TinyServer(refused=("n",)) as server:
        config = EndpointConfig(base_url=server.url, model="tiny")
        with open_servers(SPENDING, [config], tmp_path, SamplingConfig(max_tokens=8, stop=("x",))) as servers:
            found = servers.known.of_any_sampling(config)
    read = KnownServers(tmp_path / FILE_NAME)
    other = KnownServers()
    other.update(read.as_dict())
    assert found is not None and not found.n and found.unverified
    assert read.of_any_sampling(config) == other.of_any_sampling(config) == found


def test_a_judge_is_examined_once(tmp_path: Path) -> None:
    with TinyServer(complete=graded) as server:
        config = judge(server)
        with open_servers(SPENDING, [], tmp_path, SamplingConfig(), config.endpoints) as servers:
            check_servers(config, PROMPTS, servers)
            checks = server.count
            assert build_reward(config, session=servers)(PROMPTS, ["a", "b", "c"], None).values == [5.0] * 3
            assert server.count == checks + 3


def test_a_step_counts_what_rewards_ask_but_not_their_check(tmp_path: Path) -> None:
    with TinyServer(complete=graded) as server:
        config = judge(server)
        with open_servers(SPENDING, [], tmp_path, SamplingConfig(), config.endpoints) as servers:
            check_servers(config, PROMPTS, servers)
            reward = build_reward(config, session=servers)
            target = RemoteTarget(ScriptedConnection(), TargetEndpointConfig(base_url=server.url, model="big"))
            measure = StepMetrics(Ranks(), target, servers)
            reward(PROMPTS, ["a", "b", "c"], None)
            target.respond(Engine({}), [target.encode(PROMPTS[0], None)], SamplingParams(), [1])
            metrics = measure._asked()
            assert (metrics["endpoint/requests"], metrics["endpoint/requests/reward"]) == (4, 3)
            assert (metrics["endpoint/usd"], metrics["endpoint/usd/reward"]) == (2.0, 1.5)
            assert StepMetrics(Ranks(), None, servers)._asked()["endpoint/requests/reward"] == 0


def test_an_evaluation_counts_its_own_requests() -> None:
    target = RemoteTarget(ScriptedConnection(), TargetEndpointConfig(base_url="http://127.0.0.1:1/v1", model="big"))
    measure = StepMetrics(Ranks(), target)
    target.respond(Engine({}), [target.encode(prompt, None) for prompt in PROMPTS], SamplingParams(), [1, 2, 3])
    evaluated = measure.of_evaluation()
    assert evaluated["eval/endpoint/requests"] == 3 and "endpoint/requests" not in evaluated
    assert measure._asked()["endpoint/requests"] == 0


def test_without_servers_there_are_no_metrics_of_them() -> None:
    measure = StepMetrics(Ranks(), None, NO_SERVERS)
    assert measure.of_servers == () and measure._asked() == {}
    assert measure.of_evaluation() == {}


def test_the_directory_of_a_job_that_asked_a_server_is_not_taken_for_a_training_run(tmp_path: Path) -> None:
    """Otherwise an evaluation or a search that was interrupted could not be begun again."""
    identity = job_identity(tmp_path)
    refuse_run(tmp_path)
    assert job_identity(tmp_path) == identity
    (tmp_path / "run_id").write_text("of a training\n")
    assert job_identity(tmp_path) == "of a training"
