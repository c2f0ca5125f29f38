"""A class of the user's own as loss or advantage: what is checked when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignpro.config import ObjectiveConfig
from alignpro.errors import ConfigError
from alignpro.training.objective import build_objective

SOURCE = """
from alignpro.objectives import Advantage, GAE, PolicyGradient

class Plain(Advantage):
    needs_group = True

    def __init__(self, scale=1.0):
        self.scale = scale

class Once(PolicyGradient):
    pass

def function(sampled):
    return sampled.returns
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_it_is_made_with_its_arguments(file: Path) -> None:
    config = ObjectiveConfig(advantage=f"{file}:Plain", advantage_params={"scale": 2.0}, loss=f"{file}:Once")
    loss, advantage, _ = build_objective(config, 2)
    assert type(loss).__name__ == "Once"
    assert advantage.scale == 2.0  # type: ignore[attr-defined]


def test_an_advantage_of_ones_own_says_whether_importance_weights_correct_it(file: Path) -> None:
    config = ObjectiveConfig(advantage=f"{file}:Plain")
    with pytest.raises(ConfigError, match="importance weights correct an advantage that takes only a baseline"):
        build_objective(config, 2, ahead=True)
    file.write_text(SOURCE.replace("needs_group = True", "reweightable = True"))
    assert build_objective(ObjectiveConfig(advantage=f"{file}:Plain"), 2, ahead=True)[1].reweightable


@pytest.mark.parametrize(
    ("settings", "group", "problem"),
    [
        ({"advantage": "{file}:Plain"}, 1, "needs at least 2"),
        ({"advantage": "{file}:Nothing"}, 2, "has no 'Nothing'; its classes: Advantage, GAE, Once, Plain"),
        ({"advantage": "{file}:function"}, 2, "must be a subclass of alignpro.objectives.advantages.Advantage"),
        ({"advantage": "{file}:Once"}, 2, "must be a subclass of alignpro.objectives.advantages.Advantage"),
        ({"advantage": "{file}:Plain", "advantage_params": {"bias": 1}}, 2, "cannot be made with"),
        ({"loss": "{file}:Once", "epochs": 2}, 2, "is on-policy: it requires epochs=1"),
        ({"loss": "{file}.txt:Once"}, 2, "there is no module"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_so(
    settings: dict[str, Any], group: int, problem: str, file: Path
) -> None:
    given = {key: value.format(file=file) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(ConfigError, match=problem):
        build_objective(ObjectiveConfig(**given), group)


def test_built_in_ones_take_no_arguments_and_other_names_are_errors() -> None:
    with pytest.raises(ValueError, match="arguments of a class of your own"):
        ObjectiveConfig(advantage_params={"lam": 1.0})
    with pytest.raises(ValueError, match="expected policy_gradient, ppo_clip, gibbs, distillation, or a class"):
        ObjectiveConfig(loss="ppo")
