"""The files that an evaluation writes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignpro.config import EvalConfig, ModelConfig, default_name, dump_config, target_parts
from alignpro.evaluation.changes import largest_changes
from alignpro.evaluation.charts import plot_comparison
from alignpro.evaluation.comparison import Record, compare
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.report import write_report
from alignpro.evaluation.report_content import Report
from alignpro.evaluation.results import ArmGroup, Evaluation
from alignpro.evaluation.rewards_file import REWARDS_FILE
from alignpro.prompting.model_card import CARD_FILE, write_section
from alignpro.theory.statistics import Estimate
from alignpro.training.durability import disk_errors, replace_file, replace_text
from alignpro.training.loggers.jsonl import read_rows

logger = logging.getLogger(__name__)


def write_outputs(config: EvalConfig, result: Evaluation, summary: Mapping[str, Any]) -> None:
    """Write ``samples.jsonl``, ``rewards.json``, ``figure.png``, ``report.html``, ``config.yaml`` and ``summary.json``.

    Raises:
        CheckpointError: A file cannot be written.
    """
    with disk_errors(str(config.out), "make room, then evaluate again"):
        _write(config.out, config, result, summary)
    for arm in result.arms:
        logger.info("%-18s mean %s  penalised %.4f", arm.label, _shown(arm.reward), arm.penalised.value)
    if result.gap:
        logger.info("%-18s %s", "gap recovered", _shown(result.gap))
    logger.info("%s  %s  %s", *(config.out / name for name in ("summary.json", "figure.png", "report.html")))


def _write(out: Path, config: EvalConfig, result: Evaluation, summary: Mapping[str, Any]) -> None:
    pair = _pair(config)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
    replace_file(out / "samples.jsonl", lambda temporary: temporary.write_bytes(text.encode(errors="surrogatepass")))
    replace_text(out / REWARDS_FILE, json.dumps(result.rewards.as_dict()))
    plot_comparison([ArmGroup(pair, result.arms)], out / "figure.png")
    report = Report(
        title=config.title,
        pair=pair,
        arms=result.arms,
        gap=result.gap,
        bound=result.bound,
        gibbs=result.gibbs,
        kl_coef=config.kl_coef,
        curves=_curves(config),
        convergence={method_label(name): each for name, each in result.convergence.items()},
        notes=result.notes,
        rows=result.rows,
        changes=largest_changes(result.rows),
        verdict=_verdict(config, result),
        judgements={"": result.judge} if result.judge is not None else {},
        refusals={"": result.refusals} if result.refusals is not None else {},
        configuration=dump_config(config),
        versions=summary["versions"],
        created=time.strftime("%Y-%m-%d"),
    )
    write_report(out / "report.html", report)
    (out / "config.yaml").write_text(dump_config(config))
    _describe_models(config, result)
    # Written last and atomically: this file marks the evaluation as complete.
    replace_text(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))


def _curves(config: EvalConfig) -> dict[str, list[dict[str, Any]]]:
    """Label → metrics of the run that produced a model, if the model is the ``model/`` of a run directory."""
    models = {"align_pro": config.prompter, "oracle": config.oracle}
    rows = {
        method_label(arm): read_rows(Path(m.path).parent / "metrics.jsonl")
        for arm, m in models.items()
        if m is not None
    }
    return {label: metrics for label, metrics in rows.items() if metrics}


def _describe_models(config: EvalConfig, result: Evaluation) -> None:
    """Add the held-out rewards to the cards of the models that are the ``model/`` of a run directory."""
    arms = {arm.name: arm for arm in result.arms}
    for name, model in (("align_pro", config.prompter), ("oracle", config.oracle)):
        if model is None or name not in arms or Path(model.path).name != "model":
            continue
        directory, arm = Path(model.path), arms[name]
        if not (directory / CARD_FILE).is_file():
            continue
        rows = [("mean reward", _shown(arm.reward)), ("penalised", _shown(arm.penalised))]
        if arm.difference is not None:
            rows.append(("against no fine-tuning", _shown(arm.difference)))
        if name == "align_pro" and result.gap is not None:
            rows.append(("share of the oracle's gain", _shown(result.gap)))
        if arm.kl is not None:
            rows.append(("KL, nats per sequence", f"{arm.kl:.2f}"))
        table = ["| | 95 % interval |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
        told = f"On {arm.n} held-out prompts of `{config.data.source}`, from `{config.out}`:"
        try:
            write_section(directory, "Held-out evaluation", [told, "", *table])
        except OSError as error:
            logger.warning("%s: its card does not tell this evaluation: %s", directory, error)


def _verdict(config: EvalConfig, result: Evaluation) -> str:
    """What the evaluation says in a sentence or two."""
    records = [
        Record(config.title, None, _pair(config), arm.name, config.seed, result.rewards, label=arm.label)
        for arm in result.arms
    ]
    judged = [result.judge["verdict"]] if result.judge is not None else []
    warnings = result.refusals["warnings"] if result.refusals is not None else []
    return " ".join([*warnings, compare(records).verdict, *judged])


def _shown(estimate: Estimate) -> str:
    if estimate.not_estimable is not None:
        value = f"{estimate.value:.4f}  " if math.isfinite(estimate.value) else ""
        return f"{value}[not estimable: {estimate.not_estimable}]"
    return f"{estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]"


def _pair(config: EvalConfig) -> str:
    """The name of the pair in the figure: the models' directories, or the run directory if a path is a run's ``model/``."""

    local = isinstance(config.target, str | ModelConfig)
    target = default_name(config.target_model) if local else target_parts(config.target)[0].name
    named = config.prompter or config.reference
    return f"{default_name(named)} → {target}" if named else target
