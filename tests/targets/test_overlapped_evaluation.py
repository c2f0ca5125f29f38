"""An evaluation samples the rewrites of further prompts while a server answers those of the prompts before."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
from scripted_server import ScriptedConnection
from tiny_models import tiny_language_model

from alignpro.config import EvalConfig, TargetEndpointConfig, validate_config
from alignpro.data import Prompt
from alignpro.endpoints.types import Answer, Query
from alignpro.evaluation import arms
from alignpro.rewards import build_reward
from alignpro.targets.remote import RemoteTarget

PROMPTS = [Prompt.from_text(f"say {word}") for word in ("one", "two", "three")]
REWRITES = 2


class Late(ScriptedConnection):
    """Gives the answers to a prompt's rewrites once those of the next prompt have been asked about, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited: list[tuple[Query, Future[list[Answer]]]] = []

    def submit(self, query: Query) -> Future[list[Answer]]:
        future: Future[list[Answer]] = Future()
        self.awaited.append((query, future))
        self.queries.append(query)
        asked = len(self.queries)
        if asked % REWRITES == 0 and asked > REWRITES:  # the next prompt has been asked about
            self.give(REWRITES)
        if asked == REWRITES * len(PROMPTS):
            self.give(REWRITES)
        return future

    def give(self, count: int) -> None:
        for query, future in self.awaited[:count]:
            future.set_result(self.reply(query))
        del self.awaited[:count]


def letters(prompts: list[Prompt], responses: list[str]) -> list[float]:
    """A reward for many letters."""
    return [float(len(response)) for response in responses]


def sampled(connection: ScriptedConnection, tmp_path: Path) -> arms.ArmSamples:
    url = "http://127.0.0.1:1/v1"
    config = validate_config(
        EvalConfig,
        {
            "out": str(tmp_path),
            "data": {"source": "none.jsonl"},
            "target": {"endpoint": {"base_url": url, "model": "big"}},
            "reward": {"components": [{"kind": "function", "function": letters}]},
            "rewrite": {"max_tokens": 4},
            "respond": {"max_tokens": 4},
        },
    )
    target = RemoteTarget(connection, TargetEndpointConfig(base_url=url, model="big"))
    sampler = arms.ArmSampler(config, PROMPTS, target, build_reward(config.reward))
    return sampler.sample_rewrites("align_pro", tiny_language_model("qwen2"), REWRITES)


def test_prompts_are_asked_about_before_those_before_them_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers to a prompt come only when the next one has been asked about, so otherwise it would wait forever."""
    expected = sampled(ScriptedConnection(), tmp_path)
    monkeypatch.setattr(arms, "_CHUNK_PROMPTS", 1)
    late = sampled(Late(), tmp_path)
    assert late.scores.rewards.equal(expected.scores.rewards)
    assert late.scores.samples == expected.scores.samples
