"""rewards.json: what was evaluated comes back to the digit, and what is not such a file says why."""

import json

import numpy as np
import pytest
import torch

from alignpro.config import RewardConfig
from alignpro.errors import DataError
from alignpro.evaluation.rewards_file import (
    ArmRewards,
    EvaluationRewards,
    parse_rewards,
    read_rewards,
    reward_hash,
)
from alignpro.theory.statistics import finite


def rewards() -> EvaluationRewards:
    raw = finite(torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0)))
    return EvaluationRewards(["a", "b", "c"], [0, 0, 1], {"align_pro": ArmRewards(raw, raw - 0.1)}, 7, "0123")


def test_rewards_come_back_to_the_digit(tmp_path):
    written = rewards()
    (tmp_path / "rewards.json").write_text(json.dumps(written.as_dict()))
    read = read_rewards(tmp_path / "rewards.json")
    assert (read.prompts, read.clusters, read.seed, read.reward) == (["a", "b", "c"], [0, 0, 1], 7, "0123")
    assert np.array_equal(read.arms["align_pro"].raw, written.arms["align_pro"].raw)
    assert np.array_equal(read.arms["align_pro"].penalised, written.arms["align_pro"].penalised)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [], "expected an object"),
        (lambda content: content | {"prompts": []}, "prompts: expected a list of ids"),
        (lambda content: content | {"clusters": [0]}, "clusters: expected one number for each of the 3 prompts"),
        (lambda content: content | {"arms": {}}, "at least one arm"),
        (lambda content: {"prompts": ["a"]}, "lacks clusters, arms, seed, reward"),
        (lambda content: content | {"arms": {"x": {"raw": [[[1.0]]] * 3}}}, "arms.x.penalised: expected rewards"),
        (lambda content: content | {"arms": {"x": {"raw": [[[1.0], [1.0, 2.0]]]}}}, "all of one size"),
        (lambda content: content | {"arms": {"x": {"raw": [[[1.0]]]}}}, r"rewards of 3 prompts .* \[1, 1, 1\]"),
        (
            lambda content: content | {"arms": {"x": {"raw": [[[1.0]], [[float("nan")]], [[1.0]]]}}},
            r"arms.x.raw\[1, 0, 0\]: the reward is not finite",
        ),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(DataError, match=message):
        parse_rewards(change(rewards().as_dict()), "eval/rewards.json")


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(DataError, match="run `alignpro eval` again"):
        read_rewards(tmp_path / "rewards.json")
    (tmp_path / "rewards.json").write_text('{"prompts"')
    with pytest.raises(DataError, match="cannot be read"):
        read_rewards(tmp_path / "rewards.json")


def test_the_hash_depends_on_every_key_of_the_reward():
    def config(**keys):
        return RewardConfig.model_validate({"components": [{"kind": "function", "function": "module:score"} | keys]})

    assert reward_hash(config()) == reward_hash(config())
    assert len({reward_hash(config()), reward_hash(config(weight=2.0)), reward_hash(config(params={"n": 1}))}) == 3
