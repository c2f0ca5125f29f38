"""Self-reward: what each iteration gains by the task's own reward, for each α, and whether that fades."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from alignpro.config import ExperimentConfig, SelfRewardMethod
from alignpro.evaluation.charts import to_svg
from alignpro.evaluation.experiment_charts import plot_reward_over_iterations
from alignpro.evaluation.report_content import Analysis
from alignpro.experiments.evaluated_cells import MethodRecords, by_group
from alignpro.experiments.frontier import shown
from alignpro.experiments.method_names import method_name
from alignpro.theory.statistics import difference_over_seeds, mean_over_seeds

_TEXT = (
    "The mean reward of the task on held-out prompts after each iteration, with 95 % intervals, unadjusted. Each iteration "
    "starts from the one before. The training itself saw ranks of that reward, weighed by α, and of its own likelihood, by 1 − α."
)


def self_reward_analyses(config: ExperimentConfig, methods: Sequence[MethodRecords]) -> list[Analysis]:
    """One analysis for each group with iterations of self-reward.

    Args:
        config: The experiment.
        methods: What was evaluated.
    """
    found = []
    for (task, target, prompter), each in by_group(methods).items():
        start = next((method for method in each if method.method.partition(":")[0] == "sft_prompter"), None)
        series: dict[str, list[MethodRecords]] = {}
        for method in each:
            if isinstance(config.methods[method.cell.method], SelfRewardMethod):
                point = f", {method.cell.point.label}" if method.cell.point else ""
                name = f"{method_name(config, method.cell.method)}, α = {method.cell.alpha:g}{point}"
                series.setdefault(name, []).append(method)
        if series:
            found.append(_analysis(f"{task} · {prompter} → {target}", series, start))
    return found


def _analysis(group: str, series: dict[str, list[MethodRecords]], start: MethodRecords | None) -> Analysis:
    curves, rows, results, sentences = {}, [], [], [_TEXT]
    for name, iterations in series.items():
        ordered = sorted(iterations, key=lambda each: each.cell.iteration)
        chain = [*([start] if start is not None else []), *ordered]
        means = [(each.cell.iteration, mean_over_seeds(each.rewards, each.clusters)) for each in chain]
        curves[name] = means
        gains = _gains(chain)
        if len(gains) > 1:
            first, last = min(gains), max(gains)
            sentences.append(
                f"{name}: {gains[first]['text']} in iteration {first}, {gains[last]['text']} in iteration {last}."
            )
        for iteration, mean in means:
            gain = gains.get(iteration)
            rows.append((name, str(iteration), shown(mean), "–" if gain is None else gain["text"]))
            results.append(
                {
                    "series": name,
                    "alpha": ordered[0].cell.alpha,
                    "iteration": iteration,
                    "reward": mean.as_dict(),
                    "gain": None if gain is None else gain["gain"],
                }
            )
    return Analysis(
        f"Self-reward: {group}",
        " ".join(sentences),
        figure=to_svg(plot_reward_over_iterations, curves),
        header=("Method", "Iteration", "Mean reward", "Gain over the one before"),
        rows=rows,
        results={"kind": "self_reward", "group": group, "iterations": results},
    )


def _gains(chain: Sequence[MethodRecords]) -> dict[int, dict[str, Any]]:
    """Number of an iteration → its gain over the one before, paired by prompt and seed, of those whose predecessor is there."""
    found = {}
    for before, after in pairwise(chain):
        if after.cell.iteration == before.cell.iteration + 1:
            gain = difference_over_seeds(after.rewards, before.rewards, after.clusters)
            found[after.cell.iteration] = {"gain": gain.as_dict(), "text": shown(gain)}
    return found
