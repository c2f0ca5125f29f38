"""The dial at strength s beside trainings for λ/s."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_experiment import tiny_experiment
from tiny_runs import Workshop

from alignpro.config import ExperimentConfig, resolve_config
from alignpro.errors import ConfigError
from alignpro.evaluation.comparison import Record
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards
from alignpro.experiments.cells import Cell, cells
from alignpro.experiments.dial_accuracy import dial_analyses
from alignpro.experiments.evaluated_cells import MethodRecords

PROMPTS = 20


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("dial"))


def at(kl_coef: float, **more: object) -> dict[str, object]:
    """A training at another λ."""
    return {"kind": "train", "settings": {"objective": {"kl": {"coef": kl_coef}}, **more}}


def records(plan: list[Cell], method: str, mean: float, kl: float, *, penalty: float = 0.0) -> MethodRecords:
    """A method of three seeds whose rewards and KL lie around means."""
    own = [cell for cell in plan if cell.name.startswith(f"cells/letters/toy/{method}")]
    rng = np.random.default_rng(round(1000 * mean) + len(method))
    made = []
    for cell in own:
        raw = mean + 0.01 * rng.normal(size=(PROMPTS, 2, 2))
        arm = ArmRewards(raw, raw - penalty, kl + 0.01 * rng.normal(size=PROMPTS))
        rewards = EvaluationRewards([f"{i}" for i in range(PROMPTS)], range(PROMPTS), {"arm": arm}, cell.seed, "r")
        made.append(Record("letters", "tiny", "toy", method, cell.seed, rewards))
    return MethodRecords("letters", "toy", "tiny", method, method, own[0], made)


def test_each_strength_is_compared_with_the_training_for_its_lambda(shop: Workshop, tmp_path: Path) -> None:
    methods = {
        "align_pro": {"kind": "train"},
        "dial": {"kind": "dial", "of": "align_pro", "strengths": [0, 0.5, 0.75, 1.5]},
        "half": at(0.1),
        "other": at(0.1, run={"steps": 2}),  # not as align_pro but for λ
        "more": at(0.0333333333),
    }
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods, seeds=[0, 1, 2]))
    plan = cells(config)
    evaluated = [
        records(plan, "align_pro", 0.8, 2.0),
        records(plan, "dial/tiny/s_0/", 0.3, 0.0),
        records(plan, "dial/tiny/s_0.5", 0.5, 1.0, penalty=0.1),
        records(plan, "dial/tiny/s_0.75", 0.7, 1.5),  # nothing was trained for λ/0.75
        records(plan, "dial/tiny/s_1.5", 0.9, 3.0),
        records(plan, "half", 0.6, 1.5),
        records(plan, "other", 0.1, 5.0),
        records(plan, "more", 0.9, 3.0),
    ]
    (found,) = dial_analyses(config, evaluated)
    half, more = found.results["strengths"]
    assert (half["strength"], half["trained"], more["strength"], more["trained"]) == (0.5, "half", 1.5, "more")
    assert half["kl_coef"] == pytest.approx(0.1) and more["kl_coef"] == pytest.approx(0.05 / 1.5)
    values = [half[key]["value"] for key in ("reward", "kl", "objective")]
    assert values == pytest.approx(
        [-0.1, -0.5, -0.1 - 0.1 + 0.1 * 0.5], abs=0.01
    )  # means of values with a deviation of 0.01
    assert more["objective"]["low"] < 0 < more["objective"]["high"]
    assert "At 1 of 2 strengths, the difference of J is clear of 0." in found.text
    assert found.figure is not None and [row[:2] for row in found.rows] == [("0.5", "0.1"), ("1.5", "0.0333")]


def test_a_soft_prompt_has_no_dial_which_is_told_before_it_is_trained(shop: Workshop, tmp_path: Path) -> None:
    soft = {"kind": "train", "settings": {"policy": {"adapter": {"kind": "soft_prompt", "virtual_tokens": 2}}}}
    methods = {"soft": soft, "dial": {"kind": "dial", "of": "soft", "strengths": [0.5]}}
    with pytest.raises(ConfigError, match=r"methods\.dial\.of=soft: it trains a soft prompt"):
        cells(resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods)))


def test_without_such_a_training_there_is_nothing_to_say(shop: Workshop, tmp_path: Path) -> None:
    methods = {"align_pro": {"kind": "train"}, "dial": {"kind": "dial", "of": "align_pro", "strengths": [0.5]}}
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods))
    plan = cells(config)
    evaluated = [records(plan, "align_pro", 0.8, 2.0), records(plan, "dial/tiny/s_0.5", 0.5, 1.0)]
    assert dial_analyses(config, evaluated) == []


def test_each_dial_is_compared_by_itself(shop: Workshop, tmp_path: Path) -> None:
    methods = {
        "align_pro": {"kind": "train"},
        "k1": {"kind": "train", "settings": {"objective": {"kl": {"estimator": "k1"}}}},
        "half": at(0.1),
        "k1_half": {"kind": "train", "settings": {"objective": {"kl": {"estimator": "k1", "coef": 0.1}}}},
        "dial": {"kind": "dial", "of": "align_pro", "strengths": [0.5]},
        "dial_k1": {"kind": "dial", "of": "k1", "strengths": [0.5]},
    }
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods))
    plan = cells(config)
    places = ["half/", "k1_half/", "dial/tiny/s_0.5", "dial_k1/tiny/s_0.5"]
    evaluated = [records(plan, place, 0.5 + 0.1 * i, 1.0) for i, place in enumerate(places)]
    found = dial_analyses(config, evaluated)
    assert [each.title for each in found] == [f"Dial: letters · tiny → toy · {dial}" for dial in ("dial", "dial_k1")]
    trained = [[each["trained"] for each in one.results["strengths"]] for one in found]
    assert trained == [["half/"], ["k1_half/"]]


def test_a_dial_is_not_compared_with_its_own_training_nor_where_lambda_adapts(shop: Workshop, tmp_path: Path) -> None:
    adapts = {"settings": {"objective": {"kl": {"target": 3.0}}}}
    methods = {
        "align_pro": {"kind": "train"},
        "dial": {"kind": "dial", "of": "align_pro", "strengths": [1.0]},
        "adapts": {"kind": "train", **adapts},
        "adapts_half": {"kind": "train", "settings": {"objective": {"kl": {"target": 3.0, "coef": 0.1}}}},
        "dial_adapts": {"kind": "dial", "of": "adapts", "strengths": [0.5]},
    }
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods))
    plan = cells(config)
    places = ["align_pro/", "dial/tiny/s_1/", "adapts/", "adapts_half/", "dial_adapts/tiny/s_0.5"]
    assert dial_analyses(config, [records(plan, place, 0.5, 1.0) for place in places]) == []
