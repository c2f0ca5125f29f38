"""From how many responses of the target on training a prompter pays against optimising an instruction.

Both curves are what the methods themselves see: of a rival, the mean of its best instruction so far on its validation prompts;
of a training, the reward on the prompts on which the run evaluates itself, or of its training samples if it does not. The best
so far is the maximum of noisy means, and so too high; what both reach in the end is compared on held-out prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignpro.config import ExperimentConfig, RivalMethod, TrainConfig, TrainMethod
from alignpro.evaluation.charts import to_svg
from alignpro.evaluation.experiment_charts import CallCurve, plot_reward_against_calls
from alignpro.evaluation.report_content import Analysis
from alignpro.experiments.cell_jobs import calls_per_step
from alignpro.experiments.cells import Cell
from alignpro.experiments.evaluated_cells import MethodRecords, by_group
from alignpro.experiments.frontier import shown
from alignpro.experiments.rivals.run import read_result
from alignpro.theory.statistics import difference_over_seeds
from alignpro.training.loggers.jsonl import read_rows


def crossing_analyses(
    config: ExperimentConfig, done: Sequence[Cell], methods: Sequence[MethodRecords]
) -> list[Analysis]:
    """One analysis for each group with a rival and a trained prompter.

    Args:
        config: The experiment.
        done: The cells that are done.
        methods: What was evaluated.
    """
    found = []
    for (task, target, prompter), each in by_group(methods).items():
        rivals = [method for method in each if isinstance(config.methods[method.cell.method], RivalMethod)]
        trained = [
            method
            for method in each
            if isinstance(config.methods[method.cell.method], TrainMethod) and method.cell.trained_on is None
        ]
        if rivals and trained:
            pair = f"{prompter} → {target}" if prompter else target
            found.append(_analysis(f"{task} · {pair}", rivals, trained, done))
    return found


def crossing_point(ours: CallCurve, theirs: CallCurve) -> float | None:
    """The number of calls from which on one curve is not below another, up to where the shorter one ends; None if it is there.

    Args:
        ours: The curve that should be above.
        theirs: The other one.
    """
    end = min(ours.calls[-1], theirs.calls[-1])
    grid = [each for each in sorted({*ours.calls, *theirs.calls}) if max(ours.calls[0], theirs.calls[0]) <= each <= end]
    above = [_at(ours, each) >= _at(theirs, each) for each in grid]
    if not above or not above[-1]:
        return None
    below = [i for i, each in enumerate(above) if not each]
    return grid[below[-1] + 1] if below else grid[0]


def mean_curve(curves: Sequence[CallCurve]) -> CallCurve:
    """The mean of curves of several seeds, where all of them have a value."""
    start, end = max(each.calls[0] for each in curves), min(each.calls[-1] for each in curves)
    grid = [each for each in sorted({call for curve in curves for call in curve.calls}) if start <= each <= end]
    return CallCurve(grid, [float(np.mean([_at(c, each) for c in curves])) for each in grid], curves[0].steps)


def training_curve(run: Path, calls_per_step: float) -> CallCurve | None:
    """The reward of a training by responses of the target; None if its metrics are gone.

    Args:
        run: The run directory.
        calls_per_step: Responses that a step draws for training.
    """
    rows = read_rows(run / "metrics.jsonl")
    evaluated = [(row["step"], row["eval/reward"]) for row in rows if "eval/reward" in row]
    points = evaluated if len(evaluated) > 1 else [(r["step"], r["reward/mean"]) for r in rows if "reward/mean" in r]
    if not points:
        return None
    return CallCurve([calls_per_step * step for step, _ in points], [reward for _, reward in points])


def _analysis(
    title: str, rivals: Sequence[MethodRecords], trained: Sequence[MethodRecords], done: Sequence[Cell]
) -> Analysis:
    shared = Counter(each.label for each in (*rivals, *trained))
    names = {
        each.method: each.label if shared[each.label] == 1 else f"{each.label} ({each.method})"
        for each in (*rivals, *trained)
    }
    curves = {names[each.method]: curve for each in (*rivals, *trained) if (curve := _curve(each, done)) is not None}
    sentences, rows, results = [], [], []
    for ours in trained:
        for theirs in rivals:
            point, one, other = None, names[ours.method], names[theirs.method]
            if one in curves and other in curves:
                point = crossing_point(curves[one], curves[other])
                last = f"{one} is below {other} at the last number of target calls that both have."
                sentences.append(f"{one} is not below {other} from {point:,.0f} target calls on." if point else last)
            difference = difference_over_seeds(ours.rewards, theirs.rewards, ours.clusters)
            rows.append((f"{one} − {other}", shown(difference), "–" if point is None else f"{point:,.0f}"))
            results.append(
                {
                    "trained": ours.method,
                    "rival": theirs.method,
                    "crossing": point,
                    "difference": difference.as_dict(),
                }
            )
    text = " ".join(
        [
            *sentences,
            "The chart has what each method sees in its search or training: for rivals the best so far on their validation "
            "prompts, which is too high; the table has the difference on held-out prompts, unadjusted.",
        ]
    )
    return Analysis(
        f"Target calls: {title}",
        text,
        figure=to_svg(plot_reward_against_calls, curves),
        header=("Difference on held-out prompts", "Reward", "Not below from … calls on"),
        rows=rows,
        results={"kind": "crossing", "group": title, "pairs": results},
    )


def _curve(each: MethodRecords, done: Sequence[Cell]) -> CallCurve | None:
    """The mean curve over the seeds of a method; None if a seed has none."""
    point = each.cell.point and each.cell.point.name
    of_seeds = [
        cell
        for cell in done
        if (cell.task, cell.target, cell.method, cell.prompter)
        == (each.task, each.target, each.cell.method, each.prompter)
        and (cell.point and cell.point.name) == point
        and cell.trained_on is None
    ]
    curves = [_of_cell(cell) for cell in of_seeds]
    known = [curve for curve in curves if curve is not None]
    return mean_curve(known) if known and len(known) == len(curves) else None


def _of_cell(cell: Cell) -> CallCurve | None:
    if cell.jobs[0].command == "rival":
        found = read_result(cell.directory / "run")
        calls, rewards = zip(*found["curve"], strict=True)
        return CallCurve([*calls, found["target_calls"]], [*rewards, found["mean"]], steps=True)
    training = cell.jobs[0].config
    assert isinstance(training, TrainConfig)  # the analysis is of rivals and trainings
    return training_curve(cell.directory / "run", float(calls_per_step(training)))


def _at(curve: CallCurve, calls: float) -> float:
    """The value of a curve at a number of calls between its ends."""
    if curve.steps:
        return curve.reward[int(np.searchsorted(curve.calls, calls, side="right")) - 1]
    return float(np.interp(calls, curve.calls, curve.reward))
