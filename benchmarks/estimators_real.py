"""python -m benchmarks.estimators_real: reward at equal KL after equal samples of each estimator, on a real model.

The configuration is an experiment's: a `train` method for each estimator, a `dial` of each, and a method `prior`. By default,
that is SmolLM2-135M-Instruct with five seeds (launch/presets/real/estimators.yaml), which takes days on a CPU: an interrupted
call is continued by the same one, and cells that are done are never run again.

Each seed's prompter is evaluated at several strengths, which gives its reward at several KL to the prompter before training.
Between two of them the reward is interpolated: it is that of a mixture, which takes either of them with fixed probabilities, and
whose KL is at most the interpolated one. Rewards are compared at the largest KL that all seeds of all estimators reach, and at
half of it. Intervals are over seeds and held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from alignpro.config import DialMethod, ExperimentConfig, PriorMethod, TrainConfig, TrainMethod, load_config
from alignpro.demo import world
from alignpro.demo.run import HERE, TRAINING_PROMPTS, WEIGHTS
from alignpro.experiments.cells import Cell, cells
from alignpro.experiments.evaluated_cells import MethodRecords, evaluated_methods
from alignpro.experiments.forking import Runner
from alignpro.experiments.run import run_experiment
from alignpro.theory.statistics import Clusters, SeedRewards, difference_over_seeds, mean_over_seeds
from alignpro.theory.statistics.values import FloatArray
from benchmarks import command
from benchmarks.session import Session
from benchmarks.table import print_table

REAL = Path(__file__).parents[1] / "launch" / "presets" / "real"
SHARES = (0.5, 1.0)
"""Of the largest KL that all reach: where rewards are compared."""

app = command.new_app()


@dataclass(frozen=True)
class Point:
    """A prompter at one strength, of one seed."""

    kl: float
    """Mean over prompts, in nats per sequence."""
    rewards: FloatArray
    """(P, K, M), the prompts in the order of their ids."""


@dataclass(frozen=True)
class Curve:
    """What an estimator trained."""

    name: str
    """The key of its method."""
    seeds: dict[int, list[Point]]
    """Seed → its prompters by KL, ascending, from the prompter before training on."""
    trained: MethodRecords
    """The prompters as they were trained, at strength 1."""

    @property
    def reach(self) -> float:
        """The largest KL that the points of every seed include."""
        return min(points[-1].kl for points in self.seeds.values())

    def at(self, kl: float) -> SeedRewards:
        """The rewards at a KL within `reach`."""
        return SeedRewards.of({seed: interpolated(points, kl) for seed, points in self.seeds.items()})


@app.command(help=__doc__)
def run(
    configuration: Annotated[
        list[str] | None, typer.Argument(help="Files and overrides of an experiment; by default SmolLM2's.")
    ] = None,
    against: Annotated[str, typer.Option(help="The method that the others are compared with.")] = "exact",
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    measure(configuration, against=against, quick=quick, json_file=json_file)


def measure(
    configuration: Sequence[str] | None,
    *,
    against: str = "exact",
    quick: bool = False,
    json_file: Path | None = None,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Run what is not done, and compare; returns the content of the results file.

    Args:
        configuration: Files and overrides; None for SmolLM2's, or with ``quick`` for the demo's models.
        against: The method that the others are compared with.
        quick: A smoke test: few steps of the demo's models.
        json_file: The results file.
        runner: Runs the commands of the cells.

    Raises:
        typer.BadParameter: There is no such method, or no method `prior`.
        AlignProError: Cells failed; the others are kept.
    """
    session = Session("estimators_real", device="auto", quick=quick, file=json_file)
    default = (
        quick_arguments(session.file.parent)
        if quick
        else [str(REAL / "experiment.yaml"), str(REAL / "estimators.yaml")]
    )
    config = load_config(ExperimentConfig, list(configuration or default))
    if not isinstance(config.methods.get(against), TrainMethod):
        raise typer.BadParameter(f"--against {against}: there is no such `train` method")
    if not any(isinstance(method, PriorMethod) for method in config.methods.values()):
        raise typer.BadParameter("the experiment needs a method {kind: prior}, where every curve begins")
    run_experiment(config, runner)
    plan = cells(config)
    methods = evaluated_methods([cell for cell in plan if cell.evaluated])
    document: dict[str, Any] = {"run": session.describe(samples=samples(plan)), "results": []}
    for task, target, prompter in dict.fromkeys((each.task, each.target, each.prompter) for each in methods):
        if prompter is not None:
            group = [each for each in methods if (each.task, each.target, each.prompter) == (task, target, prompter)]
            document["results"] += rows(
                curves(config, group), against, {"task": task, "target": target, "prompter": prompter}
            )
    session.save(document)
    _print(session, document["results"])
    session.finish()
    return document


def quick_arguments(directory: Path) -> list[str]:
    """The demo's models on two estimators and two seeds, a few steps each."""
    demo = load_config(
        TrainConfig, [str(HERE / "train.yaml"), "run.out=x", "data.source=x", "policy.path=x", "target.path=x"]
    )
    prompts = directory / "prompts.jsonl"
    world.write_records(prompts, world.prompt_records(TRAINING_PROMPTS, 0, heldout=False))
    sections = {
        "out": str(directory / "experiment"),
        "seeds": [0, 1],
        "prompters": {"demo": {"policy": {"path": str(WEIGHTS / "prompter"), "adapter": {"kind": "full"}}}},
        "targets": {"demo": {"path": str(WEIGHTS / "target")}},
        "tasks": {
            "demo": {"data": {"source": str(prompts), "holdout": 0.1}, "reward": demo.reward.model_dump(mode="json")}
        },
        "methods": {
            "prior": {"kind": "prior"},
            "exact": {"kind": "train", "settings": {"objective": {"kl": {"estimator": "exact"}}}},
            "k1": {"kind": "train", "settings": {"objective": {"kl": {"estimator": "k1"}}}},
            "dial_exact": {"kind": "dial", "of": "exact", "strengths": [0.5]},
            "dial_k1": {"kind": "dial", "of": "k1", "strengths": [0.5]},
        },
        "rewrite": {"max_tokens": 40},
        "respond": {"max_tokens": 12},
        "train": {
            "run": {"steps": 3},
            "rollout": {"prompts_per_step": 8, "rewrites_per_prompt": 4},
            "optimizer": {"learning_rate": 3e-4, "micro_batch_size": 32},
        },
        "evaluation": {"prompts": 16, "rewrites_per_prompt": 2, "responses_per_rewrite": 2},
    }
    file = directory / "experiment.yaml"
    file.write_text(yaml.safe_dump(sections))
    return [str(file)]


def samples(plan: Sequence[Cell]) -> int:
    """The rewrites that a training draws.

    Raises:
        typer.BadParameter: Trainings draw different numbers, so that they are not comparable.
    """
    counts = {
        job.config.run.steps * job.config.rollout.prompts_per_step * job.config.rollout.rewrites_per_prompt
        for cell in plan
        for job in cell.jobs
        if isinstance(job.config, TrainConfig)
    }
    if len(counts) != 1:
        raise typer.BadParameter(f"the trainings draw {sorted(counts)} rewrites: give all the same")
    return counts.pop()


def curves(config: ExperimentConfig, group: Sequence[MethodRecords]) -> list[Curve]:
    """The curve of each `train` method of a group.

    Raises:
        typer.BadParameter: A method has no evaluation for a seed.
    """
    prior = next(each for each in group if isinstance(config.methods[each.cell.method], PriorMethod))
    found = []
    for trained in group:
        if not isinstance(config.methods[trained.cell.method], TrainMethod) or trained.cell.trained_on is not None:
            continue
        name = trained.cell.method
        dials = [each for each in group if _is_dial_of(config, each, name)]
        found.append(Curve(name, {seed: _points(seed, prior, [trained, *dials]) for seed in trained.arms}, trained))
    return found


def _is_dial_of(config: ExperimentConfig, each: MethodRecords, name: str) -> bool:
    method = config.methods[each.cell.method]
    return isinstance(method, DialMethod) and method.of == name


def _points(seed: int, prior: MethodRecords, others: Sequence[MethodRecords]) -> list[Point]:
    points = [Point(0.0, prior.arms[seed].raw)]
    for each in others:
        arm = each.arms[seed]
        assert arm.kl is not None  # a trained prompter's evaluation has its reference
        points.append(Point(float(arm.kl.mean()), arm.raw))
    return sorted(points, key=lambda point: point.kl)


def interpolated(points: Sequence[Point], kl: float) -> FloatArray:
    """The rewards at a KL between those of two points, (P, K, M)."""
    for low, high in pairwise(points):
        if low.kl <= kl <= high.kl and low.kl < high.kl:
            share = (kl - low.kl) / (high.kl - low.kl)
            return (1 - share) * low.rewards + share * high.rewards
    raise ValueError(f"a KL of {kl} is not between those of two points ({points[0].kl} to {points[-1].kl})")


def rows(found: Sequence[Curve], against: str, place: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each estimator and each KL at which all are compared."""
    reach = min(curve.reach for curve in found)
    clusters = found[0].trained.clusters
    (baseline,) = (curve for curve in found if curve.name == against)
    table = []
    for kl in (share * reach for share in SHARES):
        for curve in found:
            own = curve.at(kl)
            other = None if curve is baseline else difference_over_seeds(own, baseline.at(kl), clusters)
            table.append(
                place
                | {"estimator": curve.name, "seeds": len(own.seeds), "kl": kl}
                | {"reward": mean_over_seeds(own, clusters).as_dict()}
                | {f"less_{against}": None if other is None else other.as_dict()}
                | _as_trained(curve, clusters)
            )
    return table


def _as_trained(curve: Curve, clusters: Clusters) -> dict[str, Any]:
    """Reward and KL at the end of the trainings, which differ in both."""
    kl = curve.trained.kl
    assert kl is not None  # its evaluation has the reference
    return {
        "trained_reward": mean_over_seeds(curve.trained.rewards, clusters).as_dict(),
        "trained_kl": mean_over_seeds(kl, clusters).as_dict(),
    }


def _print(session: Session, table: Sequence[dict[str, Any]]) -> None:
    if not table:
        return
    (less,) = (key for key in table[0] if key.startswith("less_"))
    columns = ["task", "estimator", "KL", "reward", less.replace("_", " "), "KL as trained", "reward as trained"]
    cells_of = [
        [
            row["task"],
            row["estimator"],
            f"{row['kl']:.3g}",
            *(_shown(row[key]) for key in ("reward", less, "trained_kl", "trained_reward")),
        ]
        for row in table
    ]
    print_table(session.console, columns, cells_of, left=2, title="reward at equal KL after equal samples")


def _shown(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    low, high = (estimate[key] for key in ("low", "high"))
    return f"{estimate['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    app()
