"""The points of a sweep."""

from __future__ import annotations

from typing import Any

import pytest

from alignpro.config import RangeConfig, SweepConfig, resolve_config
from alignpro.errors import ConfigError
from alignpro.experiments.points import points_of


def sweep(search: dict[str, Any], **changes: Any) -> SweepConfig:
    """A sweep whose models do not exist."""
    sections: dict[str, Any] = {
        "out": "runs/sweep",
        "prompters": {"small": {"policy": {"path": "models/small"}}},
        "targets": {"big": {"path": "models/big"}},
        "tasks": {
            "letters": {
                "data": {"source": "a.jsonl"},
                "reward": {"components": [{"kind": "function", "function": "a:b"}]},
            }
        },
        "methods": {
            "none": {"kind": "none"},
            "gibbs": {"kind": "gibbs", "candidates": [4]},
            "align_pro": {"kind": "train"},
        },
        "sweep": search,
    }
    return resolve_config(SweepConfig, sections | changes)


RATE = "train.optimizer.learning_rate"


def test_a_grid_crosses_the_values_that_concern_a_method() -> None:
    rates = {"low": 1e-5, "high": 1e-3, "scale": "log", "count": 3}
    points = points_of(sweep({"parameters": {"kl_coef": [0.05, 0.1], RATE: rates}}))
    assert [point.name for point in points["gibbs"]] == ["kl_coef=0.05", "kl_coef=0.1"]
    assert [point.values[RATE] for point in points["align_pro"]] == [1e-5, 1e-4, 1e-3] * 2
    assert points["align_pro"][1].name == "kl_coef=0.05_learning_rate=0.0001"
    assert points["align_pro"][1].config.train["optimizer"]["learning_rate"] == 1e-4
    assert points["align_pro"][1].config.kl_coef == 0.05
    assert "none" not in points


def test_more_draws_of_a_random_search_keep_those_before() -> None:
    spread = {"low": 1e-6, "high": 1e-2, "scale": "log"}
    search = {"search": "random", "parameters": {RATE: spread, "rewrite.temperature": {"low": 0.5, "high": 1.5}}}
    few, many = (points_of(sweep(search | {"points": count}))["align_pro"] for count in (3, 64))
    assert [point.name for point in many[:3]] == [point.name for point in few]
    rates = [point.values[RATE] for point in many]
    assert all(1e-6 <= rate <= 1e-2 for rate in rates)
    assert 20 <= sum(rate < 1e-4 for rate in rates) <= 44  # the middle of the scale
    assert points_of(sweep(search | {"points": 3, "seed": 1}))["align_pro"][0].values != few[0].values


def test_lists_and_texts_have_names_that_tell_them_apart() -> None:
    points = points_of(sweep({"parameters": {"methods.gibbs.candidates": [[2], [2, 4]]}}))["gibbs"]
    assert len({point.name for point in points}) == 2
    assert [point.config.model_dump()["methods"]["gibbs"]["candidates"] for point in points] == [[2], [2, 4]]


def test_a_range_of_whole_numbers_has_whole_numbers() -> None:
    assert [RangeConfig(low=1, high=8, integer=True).at(share) for share in (0.0, 0.49, 1.0)] == [1, 4, 8]


def test_the_values_of_a_range_are_within_its_bounds_which_a_grid_includes() -> None:
    """4 significant digits of them would be outside."""
    spread = RangeConfig(low=0.000123454, high=0.123456, scale="log")
    assert [spread.at(share) for share in (0.0, 1.0)] == [0.000123454, 0.123456]
    assert spread.low <= spread.at(1e-9) and spread.at(1 - 1e-9) == spread.high  # 0.1235 is above it
    assert spread.at(0.5) == 0.003904


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"parameters": {"targets.big.path": ["a"]}}, "crosses targets itself"),
        ({"parameters": {"respond.temperature": [1.0]}}, "would change what all are compared on"),
        ({"parameters": {"kl_coef": {"low": 0.1, "high": 1.0}}}, "needs `count`"),
        ({"parameters": {"kl_coef": {"low": 1.0, "high": 0.1}}}, "low=1 is not below high=0.1"),
        ({"parameters": {"kl_coef": {"low": 0.0, "high": 0.1, "scale": "log"}}}, "positive bounds"),
        (
            {"parameters": {"train.run.steps": {"low": 1.4, "high": 3, "integer": True, "count": 2}}},
            "low=1.4: whole numbers need",
        ),
        ({"parameters": {"kl_coef": [0.1]}, "search": "random"}, "needs `points`"),
        ({"parameters": {"kl_coef": [0.1]}, "points": 3}, "search=random"),
        ({"parameters": {"rlhf.run.steps": [3]}}, "concerns none of the methods"),
        ({"parameters": {"kl_coef": [0.1]}, "methods": ["ppo"]}, "no such method"),
    ],
)
def test_what_cannot_be_swept_is_named(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(search)


def test_an_invalid_value_names_its_point() -> None:
    with pytest.raises(ConfigError, match=r"point kl_coef=-1: configuration:\n.*kl_coef"):
        points_of(sweep({"parameters": {"kl_coef": [-1]}}))


def test_a_prior_has_one_way_of_prompting() -> None:
    prompters = {"small": {"policy": {"path": "models/small"}, "prior": {"data": {"source": "pairs.jsonl"}}}}
    with pytest.raises(ConfigError, match=r"prompters.small.prior is made once"):
        sweep({"parameters": {"prompting.meta_prompt": ["default"]}}, prompters=prompters)


def test_a_key_that_a_method_sets_itself_makes_no_points_of_it() -> None:
    """Its trainings would be the same, under the names of other values."""
    own = {
        "kind": "train",
        "settings": {"objective": {"kl": {"coef": 0.2}}, "rollout": {"rewrite": {"temperature": 0.7}}},
    }
    methods = {"align_pro": {"kind": "train"}, "own": own, "gibbs": {"kind": "gibbs", "candidates": [4]}}
    points = points_of(sweep({"parameters": {"kl_coef": [0.05, 0.1]}}, methods=methods))
    assert list(points) == ["align_pro", "gibbs"]
    of_both = {"parameters": {"rewrite.temperature": [0.5, 1.0], RATE: [1e-4, 1e-3]}}
    assert [point.name for point in points_of(sweep(of_both, methods=methods))["own"]] == [
        "learning_rate=0.0001",
        "learning_rate=0.001",
    ]
    train = {"objective": {"kl": {"coef": 0.3}}}
    assert list(points_of(sweep({"parameters": {"kl_coef": [0.05]}}, methods=methods, train=train))) == ["gibbs"]
    with pytest.raises(
        ConfigError, match=r"kl_coef: concerns none of the methods: `train`, `rlhf` or .* own settings have"
    ):
        sweep({"parameters": {"kl_coef": [0.05]}}, methods={"own": own})
    part = {"parameters": {"train.objective": [{"kl": {"estimator": "k1"}}, {"kl": {"estimator": "exact"}}]}}
    assert len(points_of(sweep(part, methods={"own": own}))["own"]) == 2
