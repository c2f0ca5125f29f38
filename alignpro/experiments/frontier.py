"""Reward against KL: what each method pays for what it gains, as one chart for each task and pair."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.config import DialMethod, ExperimentConfig, SelfRewardMethod, SoftPromptMethod, TrainMethod
from alignpro.evaluation.charts import to_svg
from alignpro.evaluation.experiment_charts import FrontierPoint, plot_reward_against_kl
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.report_content import Analysis
from alignpro.experiments.evaluated_cells import MethodRecords, by_group
from alignpro.experiments.method_names import method_name
from alignpro.theory.statistics import Estimate, NotEstimable, mean_over_seeds

_NO_KL = NotEstimable("it is where all methods start")


def frontier_analyses(config: ExperimentConfig, methods: Sequence[MethodRecords]) -> list[Analysis]:
    """One analysis for each group in which two methods or points have a KL.

    Args:
        config: The experiment.
        methods: What was evaluated.
    """
    found = []
    for (task, target, prompter), each in by_group(methods).items():
        series = _series(config, each)
        points = [(name, point) for name, of_it in series.items() for point in of_it]
        if len([point for _, point in points if point.kl.value > 0]) < 2:
            continue
        baseline = next((m for m in each if m.method == "no_finetuning"), None)
        reward = None if baseline is None else mean_over_seeds(baseline.rewards, baseline.clusters).value
        pair = f"{prompter} → {target}" if prompter else target
        found.append(
            Analysis(
                f"Reward against KL: {task} · {pair}",
                "Mean reward on held-out prompts against the KL to the prompter before training, with 95 % intervals of both. "
                "The KL of trained prompters is exact along their samples; that of Gibbs resampling and of best of N is the "
                "most that it can be.",
                figure=to_svg(plot_reward_against_kl, series, reward),
                header=("Method", "KL", "Mean reward"),
                rows=[(point.label, shown(point.kl), shown(point.reward)) for _, point in points],
                results={
                    "kind": "frontier",
                    "task": task,
                    "target": target,
                    "prompter": prompter or None,
                    "points": [
                        {
                            "series": name,
                            "label": point.label,
                            "kl": point.kl.as_dict(),
                            "reward": point.reward.as_dict(),
                        }
                        for name, point in points
                    ],
                },
            )
        )
    return found


def shown(estimate: Estimate) -> str:
    """A number with its interval, or with the reason why it has none."""
    if estimate.not_estimable is not None:
        return f"{estimate.value:.3f} ({estimate.not_estimable})"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _series(config: ExperimentConfig, methods: Sequence[MethodRecords]) -> dict[str, list[FrontierPoint]]:
    """Name of a series → its points: a method with all its points and arms is one, and one for each number of candidates
    where the points of a sweep are of something else."""
    series: dict[str, list[FrontierPoint]] = {}
    for each in methods:
        if each.cell.trained_on is not None:
            continue  # transfer has a map of its own
        reward = mean_over_seeds(each.rewards, each.clusters)
        if each.method.partition(":")[0] == "sft_prompter":
            series.setdefault(each.label, []).append(FrontierPoint(each.label, Estimate(0.0, _NO_KL), reward))
        elif each.kl is not None and each.prompter is not None:
            kl = mean_over_seeds(each.kl, each.clusters, rewards=False)
            series.setdefault(_name(config, each), []).append(FrontierPoint(each.label, kl, reward))
    return series


def _name(config: ExperimentConfig, each: MethodRecords) -> str:
    method = config.methods[each.cell.method]
    if isinstance(method, SelfRewardMethod):
        return f"{method_name(config, each.cell.method)}, α = {each.cell.alpha:g}"
    if isinstance(method, DialMethod):
        return method_name(config, each.cell.method)
    if isinstance(method, TrainMethod | SoftPromptMethod):
        return method.label or method_label(each.cell.method)
    if each.cell.point is not None and not any(key.startswith("methods.") for key in each.cell.point.values):
        return method_label(each.method.partition(":")[0])  # one N at several λ
    return method_label(each.cell.method).capitalize()
