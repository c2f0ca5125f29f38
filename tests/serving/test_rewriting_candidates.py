"""Several rewrites of a prompt, of which the reward of the run chooses one by the target's answers to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rewriting_runs import ask, save_run, with_rewriting

from alignpro.config import FunctionRewardConfig, RewardConfig
from alignpro.config.serving_rewriting import CandidatesConfig
from alignpro.data import Prompt
from alignpro.engine import derive_seed
from alignpro.environments.rewriter import Rewriter
from alignpro.errors import ModelError
from alignpro.rewards import build_reward
from alignpro.serving.candidates import CandidateChooser
from alignpro.serving.contract import Outcome, TargetRequest
from alignpro.serving.prompt_span import read_conversation
from alignpro.serving.rewriting import Rewriting

TEXT = "flip the word stone pls"
REWARD = "def count(prompts, responses):\n    return [float(len(set(each))) for each in responses]\n"


@pytest.mark.parametrize("choose", ["best", "gibbs"])
def test_a_rewrite_is_chosen_by_the_reward_of_the_targets_answers(
    choose: str, model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    reward = {"components": [{"kind": "function", "function": f"{tmp_path}/reward.py:count"}]}
    run = save_run(tmp_path / "run", reward=reward)
    body = {"model": "llama", "messages": [{"role": "user", "content": TEXT}], "temperature": 0, "max_tokens": 8}

    async def use(rewriting: Rewriting) -> list[Outcome]:
        return [await rewriting.rewriter.rewrite(ask(body=body)) for _ in range(2)]

    config = {"candidates": {"count": 4, "choose": choose, "kl_coef": 0.01}, "trust_remote_code": True}
    target = tmp_path / "llama"
    target.symlink_to(model_directory("llama"))
    first, again = with_rewriting(use, run, target=target, **config)
    assert first.skipped is None
    assert first.rewrite == again.rewrite
    assert first.details is not None
    assert first.details["candidates"] == 4
    prompt = Prompt.from_text(TEXT)
    (group,) = Rewriter.load(run).rewrite_each([prompt], [derive_seed(0, prompt.id)], n=4, temperature=1.0)
    assert not isinstance(group, Exception)
    assert first.rewrite in [each.rewrite for each in group]


class Answering:
    """A target that answers each prompt with one of its texts, as often as it is asked to."""

    model = None

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.asked = answers, list[Any]()

    async def send(self, request: TargetRequest) -> Any:
        body = json.loads(request.body)
        self.asked.append(body)
        text = self.answers[body["messages"][-1]["content"]]
        choices = [{"message": {"content": text}} for _ in range(body["n"])]
        return StoredResponse(200, (), json.dumps({"choices": choices}).encode())


@dataclass(frozen=True)
class StoredResponse:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self.body

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("kl_coef", [None, 0.001, 1e6])
def test_the_best_is_chosen_and_gibbs_draws_by_reward_and_temperature(kl_coef: float | None, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    component = FunctionRewardConfig(kind="function", function=f"{tmp_path}/reward.py:count")
    answers = {"one": "aab", "two": "abcdef", "three": "abc"}
    target: Any = Answering(answers)
    choose: Any = {"choose": "best"} if kl_coef is None else {"choose": "gibbs", "kl_coef": kl_coef}
    config = CandidatesConfig(responses=2, **choose)
    chosen = []
    for number in range(1 if kl_coef is None else 40):
        request = ask(f"{TEXT} {number}")
        chooser = CandidateChooser(config, build_reward(RewardConfig(components=[component])), target, 0)
        choice = asyncio.run(chooser.choose(request, read_conversation(request), list(answers)))
        assert choice.reward == len(set(list(answers.values())[choice.index]))
        chosen.append(choice.index)
    assert {body["n"] for body in target.asked} == {2}
    assert set(chosen) == ({0, 1, 2} if kl_coef == 1e6 else {1})


def test_choosing_needs_a_reward_that_can_and_may_be_computed(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")

    async def use(rewriting: Rewriting) -> None:
        raise AssertionError("it was opened")

    with pytest.raises(ModelError, match=r"runs the code of its reward \(nowhere:reward\); if you trust it, say so"):
        with_rewriting(use, run, candidates={})
    with pytest.raises(ModelError, match="need a target"):
        with_rewriting(use, run, candidates={}, trust_remote_code=True)
