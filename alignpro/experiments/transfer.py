"""Transfer: what prompters that were trained on one target gain on others, as a map for each method."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.config import ExperimentConfig
from alignpro.evaluation.charts import to_svg
from alignpro.evaluation.experiment_charts import plot_transfer
from alignpro.evaluation.report_content import Analysis
from alignpro.experiments.evaluated_cells import MethodRecords
from alignpro.experiments.frontier import shown
from alignpro.theory.statistics import Estimate, difference_over_seeds, mean_over_seeds

BEFORE_TRAINING = "(before training)"


def transfer_analyses(config: ExperimentConfig, methods: Sequence[MethodRecords]) -> list[Analysis]:
    """One map for each task, prompter and trained method, if a prompter was evaluated on another target than its own.

    Args:
        config: The experiment.
        methods: What was evaluated.
    """
    trained: dict[tuple[str, str | None, str, str], list[MethodRecords]] = {}
    for each in methods:
        if _trained_on(each) is not None:
            point = each.cell.point.label if each.cell.point else ""
            trained.setdefault((each.task, each.prompter, each.cell.method, point), []).append(each)
    found = []
    for (task, prompter, method, point), own in trained.items():
        if any(each.cell.trained_on is not None for each in own):
            priors = [
                each for each in methods if (each.task, each.prompter, each.method) == (task, prompter, "sft_prompter")
            ]
            baselines = {each.target: each for each in methods if (each.task, each.method) == (task, "no_finetuning")}
            title = " · ".join(part for part in (task, prompter or "", method, point) if part)
            found.append(_map(config, title, [*priors, *own], baselines))
    return found


def _trained_on(each: MethodRecords) -> str | None:
    """The target on which a prompter was trained; None of what was not trained as one."""
    if "align_pro" not in each.records[0].rewards.arms:
        return None
    return each.cell.trained_on or each.target


def _map(
    config: ExperimentConfig, title: str, methods: Sequence[MethodRecords], baselines: dict[str, MethodRecords]
) -> Analysis:
    gains = all(each.target in baselines for each in methods)
    values: dict[tuple[str, str], Estimate] = {}
    for each in methods:
        value = (
            difference_over_seeds(each.rewards, baselines[each.target].rewards, each.clusters)
            if gains
            else mean_over_seeds(each.rewards, each.clusters)
        )
        values[_trained_on(each) or BEFORE_TRAINING, each.target] = value
    order = [BEFORE_TRAINING, *config.targets]
    rows = sorted({row for row, _ in values}, key=order.index)
    columns = sorted({column for _, column in values}, key=order.index)
    label = "gain over no fine-tuning" if gains else "mean reward"
    elsewhere = [value for (row, column), value in values.items() if row not in (column, BEFORE_TRAINING)]
    text = f"The {label} on held-out prompts with its 95 % interval, unadjusted."
    if gains:
        above, below = sum(each.low > 0 for each in elsewhere), sum(each.high < 0 for each in elsewhere)
        text += f" Off the diagonal, {above} of {len(elsewhere)} are above 0 and {below} are below."
    return Analysis(
        f"Transfer: {title}",
        text,
        figure=to_svg(plot_transfer, rows, columns, values, label),
        header=("Trained on", *columns),
        rows=[(row, *(shown(values[row, each]) if (row, each) in values else "–" for each in columns)) for row in rows],
        results={
            "kind": "transfer",
            "group": title,
            "of": "gain" if gains else "reward",
            "values": [
                {"trained_on": row, "evaluated_on": column, **value.as_dict()}
                for (row, column), value in values.items()
            ],
        },
    )
