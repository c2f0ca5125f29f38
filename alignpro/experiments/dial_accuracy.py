"""The dial beside what it stands for: a prompter trained for λ, at strength s, against trainings for λ/s.

If the prompter is optimal for λ, and its mixture with ρ_sft is drawn exactly, both are the same
(`alignpro.theory.mixtures`). A prompter that has not converged, and sampling token by token, make the difference that
is reported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.config import DialMethod, EvalConfig, ExperimentConfig, TrainConfig, TrainMethod
from alignpro.evaluation.charts import to_svg
from alignpro.evaluation.experiment_charts import FrontierPoint, plot_reward_against_kl
from alignpro.evaluation.report_content import Analysis
from alignpro.experiments.cells import Cell
from alignpro.experiments.evaluated_cells import MethodRecords, by_group
from alignpro.experiments.frontier import shown
from alignpro.theory.statistics import Estimate, SeedRewards, difference_over_seeds, mean_over_seeds, prompt_means


@dataclass(frozen=True)
class _Pair:
    """A strength of a dial, and the training for the same λ/s."""

    strength: float
    kl_coef: float
    """λ/s."""
    dial: MethodRecords
    trained: MethodRecords

    @property
    def reward(self) -> Estimate:
        """Of the mean rewards, the dial's less the training's."""
        return difference_over_seeds(self.dial.rewards, self.trained.rewards, self.dial.clusters)

    @property
    def kl(self) -> Estimate:
        """Likewise of the KL to ρ_sft, nats per rewrite."""
        return difference_over_seeds(_kl(self.dial), _kl(self.trained), self.dial.clusters)

    @property
    def objective(self) -> Estimate:
        """Likewise of J, the reward with its penalties less λ/s times the KL."""
        dial, trained = (_objective(each, self.kl_coef) for each in (self.dial, self.trained))
        return difference_over_seeds(dial, trained, self.dial.clusters)


def dial_analyses(config: ExperimentConfig, methods: Sequence[MethodRecords]) -> list[Analysis]:
    """One analysis for each dial of a group, where a training was run for the λ/s of a strength.

    Args:
        config: The experiment.
        methods: What was evaluated.
    """
    found = []
    for (task, target, prompter), each in by_group(methods).items():
        dials: dict[tuple[str, str], list[_Pair]] = {}
        for dial in each:
            if (pair := _pair(config, dial, each)) is not None:
                point = dial.cell.point.label if dial.cell.point else ""
                dials.setdefault((dial.cell.method, point), []).append(pair)
        for (method, point), pairs in dials.items():
            of = [part for part in (method, point) if part] if len(dials) > 1 else []
            group = " · ".join([task, f"{prompter} → {target}", *of])
            found.append(_analysis(group, sorted(pairs, key=lambda pair: pair.strength)))
    return found


def _pair(config: ExperimentConfig, dial: MethodRecords, methods: Sequence[MethodRecords]) -> _Pair | None:
    if not isinstance(config.methods[dial.cell.method], DialMethod) or dial.kl is None:
        return None
    assert dial.cell.needs is not None  # its training
    evaluation, own = dial.cell.jobs[-1].config, _training(dial.cell.needs)
    assert isinstance(evaluation, EvalConfig)  # as the cells of a dial are made
    (strength,) = evaluation.strengths
    if strength == 0 or own.objective.kl.target is not None:
        return None  # where λ adapts, none is fixed that another training could have over s
    kl_coef = own.objective.kl.coef / strength
    for each in methods:
        trained = isinstance(config.methods[each.cell.method], TrainMethod) and each.cell.trained_on is None
        if not trained or each.kl is None or each.cell.name == dial.cell.needs.name:
            continue  # at strength 1, the dial is its own training
        other = _training(each.cell)
        if math.isclose(other.objective.kl.coef, kl_coef, rel_tol=1e-6) and _all_else(other) == _all_else(own):
            return _Pair(strength, kl_coef, dial, each)
    return None


def _training(cell: Cell) -> TrainConfig:
    config = cell.jobs[0].config
    assert isinstance(config, TrainConfig)  # the first job of what is trained
    return config


def _all_else(training: TrainConfig) -> dict[str, Any]:
    """What two trainings have in common that differ in λ alone."""
    given = training.model_dump(mode="json")
    for key in ("out", "seed"):
        del given["run"][key]
    del given["objective"]["kl"]["coef"]
    return given


def _kl(each: MethodRecords) -> SeedRewards:
    assert each.kl is not None  # `_pair` has looked
    return each.kl


def _objective(each: MethodRecords, kl_coef: float) -> SeedRewards:
    """J of each prompt, by seed."""
    found = {}
    for seed, arm in each.arms.items():
        assert arm.kl is not None  # `_pair` has looked
        found[seed] = (prompt_means(arm.penalised) - kl_coef * arm.kl)[:, None]  # (P, 1)
    return SeedRewards.of(found)


def _analysis(group: str, pairs: Sequence[_Pair]) -> Analysis:
    objectives = [pair.objective for pair in pairs]
    apart = sum(each.low > 0 or each.high < 0 for each in objectives)
    series = {
        "the dial": [_point(pair, pair.dial) for pair in pairs],
        "trained for λ/s": [_point(pair, pair.trained) for pair in pairs],
    }
    return Analysis(
        f"Dial: {group}",
        "At strength s, a prompter that was trained for λ stands for one that is trained for λ/s. Differences, the "
        "dial's less the training's, have 95 % intervals, unadjusted; J is the reward with its penalties less λ/s times "
        "the KL. At "
        f"{apart} of {len(pairs)} strengths, the difference of J is clear of 0.",
        figure=to_svg(plot_reward_against_kl, series, None),
        header=("s", "λ/s", "Reward of the dial", "Difference of rewards", "Difference of the KL", "Difference of J"),
        rows=[
            (
                f"{pair.strength:g}",
                f"{pair.kl_coef:.3g}",
                shown(mean_over_seeds(pair.dial.rewards, pair.dial.clusters)),
                shown(pair.reward),
                shown(pair.kl),
                shown(objective),
            )
            for pair, objective in zip(pairs, objectives, strict=True)
        ],
        results={
            "kind": "dial",
            "group": group,
            "strengths": [
                {
                    "strength": pair.strength,
                    "kl_coef": pair.kl_coef,
                    "trained": pair.trained.method,
                    "reward": pair.reward.as_dict(),
                    "kl": pair.kl.as_dict(),
                    "objective": objective.as_dict(),
                }
                for pair, objective in zip(pairs, objectives, strict=True)
            ],
        },
    )


def _point(pair: _Pair, each: MethodRecords) -> FrontierPoint:
    return FrontierPoint(
        f"s = {pair.strength:g}",
        mean_over_seeds(_kl(each), each.clusters, rewards=False),
        mean_over_seeds(each.rewards, each.clusters),
    )
