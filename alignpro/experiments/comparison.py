"""What an experiment has found so far: a record beside each evaluation, then one report on all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.config import (
    BestOfMethod,
    DialMethod,
    EvalConfig,
    ExperimentConfig,
    GibbsMethod,
    RivalMethod,
    RLHFMethod,
    SelfRewardMethod,
    SoftPromptMethod,
    SweepConfig,
    TargetAdapterMethod,
    TrainMethod,
    target_parts,
)
from alignpro.evaluation.comparison_results import Cost
from alignpro.evaluation.directory_report import report_directories
from alignpro.evaluation.evaluated import RECORD_FILE, training_cost
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.report_content import Analysis
from alignpro.evaluation.rewards_file import REWARDS_FILE, read_rewards
from alignpro.experiments.cells import Cell
from alignpro.experiments.crossing import crossing_analyses
from alignpro.experiments.dial_accuracy import dial_analyses
from alignpro.experiments.evaluated_cells import evaluated_methods
from alignpro.experiments.frontier import frontier_analyses
from alignpro.experiments.method_names import method_name
from alignpro.experiments.rivals.run import read_result
from alignpro.experiments.self_reward_gains import self_reward_analyses
from alignpro.experiments.sweep_results import sweep_analyses
from alignpro.experiments.transfer import transfer_analyses
from alignpro.training.durability import replace_text
from alignpro.versions import versions

logger = logging.getLogger(__name__)


def write_comparison(config: ExperimentConfig, plan: Sequence[Cell]) -> None:
    """Write ``report.html`` and ``summary.json`` on the cells that are done; nothing if there are none.

    Raises:
        DataError: The cells cannot be compared.
    """
    done = [cell for cell in plan if cell.done and cell.evaluated]
    if not done:
        return
    for cell in done:
        for directory, target in _evaluations(cell):
            text = json.dumps(_record(config, cell, directory, target), indent=1, ensure_ascii=False) + "\n"
            replace_text(directory / RECORD_FILE, text)
    report = config.out / "report.html"
    analyses = _analyses(config, done)
    comparison = report_directories(
        [cell.directory / "evaluation" for cell in done], report, title=config.title, analyses=analyses
    )
    assert comparison is not None  # because there are evaluations
    cells_left = [cell.name for cell in plan if not cell.done]
    summary = comparison.as_dict() | {
        "analyses": [each.results for each in analyses],
        "cells_done": len(done),
        "cells_left": cells_left,
        "versions": versions(),
    }
    replace_text(config.out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    logger.info("%s", comparison.verdict)
    for each in analyses:
        logger.info("%s: %s", each.title, each.text)
    logger.info("%s  %s", report, config.out / "summary.json")


def _analyses(config: ExperimentConfig, done: Sequence[Cell]) -> list[Analysis]:
    """What the cells say together, beyond each method by itself."""
    methods = evaluated_methods(done)
    swept = sweep_analyses(config, methods) if isinstance(config, SweepConfig) else []
    return [
        *swept,
        *frontier_analyses(config, methods),
        *dial_analyses(config, methods),
        *self_reward_analyses(config, methods),
        *transfer_analyses(config, methods),
        *crossing_analyses(config, done, methods),
    ]


def _evaluation(cell: Cell) -> EvalConfig:
    evaluation = cell.jobs[-1].config
    assert isinstance(evaluation, EvalConfig)  # the last job of a cell that is compared
    return evaluation


def _evaluations(cell: Cell) -> list[tuple[Path, str]]:
    """The directories of a cell's evaluation and the names of their targets: one for each target of a mixture."""
    parts, directory = target_parts(_evaluation(cell).target), cell.directory / "evaluation"
    if len(parts) == 1:
        return [(directory, cell.target)]
    return [(directory / part.name, f"{cell.target}: {part.name}") for part in parts]


def _record(config: ExperimentConfig, cell: Cell, directory: Path, target: str) -> dict[str, Any]:
    """The content of the record.json in a directory of a cell's evaluation."""
    evaluation = _evaluation(cell)
    prompts = len(read_rewards(directory / REWARDS_FILE).prompts)
    return {
        "task": cell.task,
        "prompter": cell.prompter,
        "target": target,
        "seed": cell.seed,
        "methods": {arm: _method(config, cell, evaluation, arm, prompts) for arm in evaluation.sampled_arms},
    }


def _method(config: ExperimentConfig, cell: Cell, evaluation: EvalConfig, arm: str, prompts: int) -> dict[str, Any]:
    """One arm of a cell: a trained prompter is a method by its key; the others are what their arm is.

    Args:
        config: The experiment.
        cell: The cell.
        evaluation: Its evaluation.
        arm: Key of the arm.
        prompts: Number of held-out prompts that it was evaluated on.
    """
    method = (config if cell.point is None else cell.point.config).methods[cell.method]
    cost, name, label = Cost(target_calls=0.0), arm, ""
    if isinstance(method, TrainMethod | RLHFMethod | TargetAdapterMethod | SoftPromptMethod):
        trained = cell if cell.trained_on is None else cell.needs
        assert trained is not None  # what is transferred was trained
        cost = training_cost(trained.directory / "run", trained.jobs[0].config.model_dump())
        name, label = arm if isinstance(method, RLHFMethod) else cell.method, method.label or ""
    elif isinstance(method, SelfRewardMethod):
        cost, name = _cost_so_far(cell), f"{cell.method}_{cell.alpha:g}_{cell.iteration}"
        label = f"{method_name(config, cell.method)}, α = {cell.alpha:g}, iteration {cell.iteration}"
    elif isinstance(method, RivalMethod):
        found = read_result(cell.directory / "run")
        cost = Cost(float(found["target_calls"]), found["tokens"], found["seconds"])
        name, label = cell.method, method_name(config, cell.method)
    elif isinstance(method, DialMethod):
        assert cell.needs is not None  # its training, which serves all strengths
        cost = training_cost(cell.needs.directory / "run", cell.needs.jobs[0].config.model_dump())
        strength = f"{evaluation.dial_arms[arm]:g}"
        name, label = f"{cell.method}_{strength}", f"{method_name(config, cell.method)}, s = {strength}"
    elif isinstance(method, GibbsMethod | BestOfMethod):
        # What choosing takes, of each prompt anew; the answers to what was chosen are those of every method.
        candidates = (
            evaluation.candidate_counts[arm] * evaluation.responses_per_rewrite + evaluation.reward.keeps_refusals
        )
        cost = Cost(target_calls=float(candidates * prompts))
    if cell.trained_on is not None:
        name, label = f"{name}: from {cell.trained_on}", f"{label or method_label(name)} trained on {cell.trained_on}"
    if cell.point is not None:
        name, label = f"{name}: {cell.point.name}", f"{label or method_label(name)}, {cell.point.label}"
    return {"method": name, "label": label, "cost": cost.as_dict()}


def _cost_so_far(cell: Cell) -> Cost:
    """What an iteration and those before it took; a number is None if it is not known of one of them."""
    own = training_cost(cell.directory / "run", cell.jobs[0].config.model_dump())
    if cell.iteration == 1:
        return own
    assert cell.needs is not None  # the iteration before
    before = _cost_so_far(cell.needs)

    def added(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one + other

    return Cost(
        added(own.target_calls, before.target_calls),
        added(own.tokens, before.tokens),
        added(own.seconds, before.seconds),
    )
