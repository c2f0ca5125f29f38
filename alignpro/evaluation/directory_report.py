"""`alignpro report`: one report on evaluations, experiments and training runs that lie in directories."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignpro.errors import DataError
from alignpro.evaluation.changes import Change, largest_changes
from alignpro.evaluation.comparison import Record, compare
from alignpro.evaluation.comparison_results import Comparison
from alignpro.evaluation.convergence import convergence
from alignpro.evaluation.evaluated import (
    EvaluatedDirectory,
    curves_of,
    find_evaluations,
    interleaved_rows,
    records_of,
    runs_of,
)
from alignpro.evaluation.paper_figure import paper_figure
from alignpro.evaluation.refusal_rates import RefusalRates, merged, read_refusals, refusals_content
from alignpro.evaluation.report import write_report
from alignpro.evaluation.report_content import Analysis, Report
from alignpro.evaluation.results import SampleRow
from alignpro.training.durability import disk_errors
from alignpro.versions import versions


def report_directories(
    directories: Sequence[Path],
    out: Path,
    *,
    title: str = "Align-Pro",
    paper: bool = False,
    texts: bool = True,
    analyses: Sequence[Analysis] = (),
) -> Comparison | None:
    """Write one report on all directories.

    Args:
        directories: Of evaluations, of experiments or anything else with evaluations below, or of training runs.
        out: The HTML file.
        title: Of the report.
        paper: Whether to draw the values of the paper's figure too.
        texts: Whether prompts, rewrites and answers are shown; without them a report can be published whatever licence the
            prompts have.
        analyses: Of an experiment, shown below the comparison.

    Returns:
        The comparison; None if there are training runs only.

    Raises:
        DataError: A directory holds nothing to report, a file in it is damaged, or evaluations cannot be compared.
        CheckpointError: The file cannot be written.
    """
    for directory in directories:
        if not find_evaluations([directory]) and not (directory / "metrics.jsonl").is_file():
            raise DataError(
                f"{directory}: holds neither an evaluation (rewards.json, from `alignpro eval`) nor a training run "
                "(metrics.jsonl)"
            )
    evaluations = find_evaluations(directories)
    records, notes = records_of(evaluations)
    runs = [directory for directory in directories if (directory / "metrics.jsonl").is_file()]
    flags = [*(["--paper"] if paper else []), *([] if texts else ["--no-texts"])]
    command = ["alignpro report", *map(str, directories), "--out", str(out), *flags]
    return _report_records(
        records,
        evaluations,
        out,
        title=title,
        runs=runs,
        notes=notes,
        paper=paper,
        texts=texts,
        analyses=analyses,
        command=" ".join(command),
    )


def _report_records(
    records: Sequence[Record],
    evaluations: Sequence[EvaluatedDirectory],
    out: Path,
    *,
    title: str = "Align-Pro",
    runs: Sequence[Path] = (),
    notes: Sequence[str] = (),
    paper: bool = False,
    texts: bool = True,
    analyses: Sequence[Analysis] = (),
    command: str = "",
) -> Comparison | None:
    """Write the report on records, such as the cells of an experiment that are done.

    Args:
        records: What is compared; ``origin`` of each is the directory of its evaluation.
        evaluations: These directories.
        out: The HTML file.
        title: Of the report.
        runs: Training runs whose curves are shown besides those of the evaluated models.
        notes: Sentences that stand above the tables.
        paper: Whether to draw the values of the paper's figure too.
        texts: Whether samples are shown.
        analyses: Shown below the comparison.
        command: What makes the report again.

    Returns:
        The comparison; None if there are no records.

    Raises:
        DataError: The records cannot be compared.
        CheckpointError: The file cannot be written.
    """
    comparison = compare(records) if records else None
    curves = curves_of(dict.fromkeys([*runs, *runs_of(evaluations)]))
    converged = {label: each for label, rows in curves.items() if (each := convergence(rows)) is not None}
    refusals = _refusals(evaluations, records)
    warnings = dict.fromkeys(sentence for each in refusals.values() for sentence in each["warnings"])
    if comparison is not None:
        comparison = replace(comparison, verdict=" ".join([*warnings, comparison.verdict]), refusals=refusals)
    verdict = (
        comparison.verdict if comparison else "Training runs only: nothing here was evaluated on held-out prompts."
    )
    report = Report(
        title=title,
        pair=_subtitle(comparison, len(evaluations), len(curves)),
        comparison=comparison,
        verdict=verdict,
        curves=curves,
        convergence=converged,
        notes=notes,
        rows=interleaved_rows(evaluations) if texts else (),
        changes=_changes(evaluations, records) if texts else (),
        judgements=_found(evaluations, "judge"),
        refusals=refusals,
        paper=paper_figure() if paper else None,
        analyses=analyses,
        versions=versions(),
        command=command,
        created=time.strftime("%Y-%m-%d"),
    )
    with disk_errors(str(out), "name another file with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_report(out, report)
    return comparison


def _found(evaluations: Sequence[EvaluatedDirectory], key: str) -> dict[str, Any]:
    """Title → what an evaluation's summary has under a key, of those that have it."""
    found = [each for each in evaluations if each.summary.get(key)]
    alone = len(evaluations) == 1
    return {"" if alone else str(each.path): each.summary[key] for each in found}


def _refusals(evaluations: Sequence[EvaluatedDirectory], records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Title → what follows of the refusals that evaluations of a task, target and prompter recorded, over methods and seeds.

    Raises:
        DataError: A file is damaged, or refusals were counted on different prompts.
    """
    recorded = {str(each.path): read_refusals(each.path) for each in evaluations}
    groups: dict[tuple[str, str, str], dict[str, list[tuple[str, str, int, RefusalRates]]]] = {}
    for task, target in dict.fromkeys((record.task, record.target) for record in records):
        same = [record for record in records if (record.task, record.target) == (task, target)]
        prompters = list(dict.fromkeys(record.prompter for record in same if record.prompter is not None))
        for prompter in prompters or [""]:
            for record in (each for each in same if each.prompter in (None, prompter)):
                for rates in recorded[record.origin]:
                    (arm,) = record.rewards.arms
                    alone = replace(rates, arms={arm: rates.arms[arm]})
                    of_kind = groups.setdefault((task, target, prompter), {}).setdefault(rates.kind, [])
                    of_kind.append((record.method, record.label, record.seed, alone))
    found = {key: refusals_content([merged(parts) for parts in kinds.values()]) for key, kinds in groups.items()}
    return {"" if len(found) == 1 else " · ".join(filter(None, key)): each for key, each in found.items()}


def _subtitle(comparison: Comparison | None, evaluations: int, runs: int) -> str:
    tasks = len({group.task for group in comparison.groups}) if comparison else 0
    counts = ((tasks, "task"), (evaluations, "evaluation"), (runs, "training run"))
    return " · ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)


def _changes(evaluations: Sequence[EvaluatedDirectory], records: Sequence[Record]) -> list[Change]:
    """The prompts that gained and lost most in each task and target, with the first seed of Align-Pro."""
    rows: dict[tuple[str, str], list[SampleRow]] = {}
    seen: set[tuple[str, str, str]] = set()
    samples = {str(each.path): each for each in evaluations}
    for record in records:
        method = record.method.partition(":")[0]
        key = (record.task, record.target, method)
        if method in ("no_finetuning", "align_pro") and key not in seen:
            seen.add(key)
            found = samples[record.origin].rows
            rows.setdefault(key[:2], []).extend(row for row in found if row["arm"] == method)
    count = 5 if len(rows) < 2 else 2
    titles = {key: "" if len(rows) < 2 else f"{key[0]} · {key[1]}" for key in rows}
    return [change for key, each in rows.items() for change in largest_changes(each, count, title=titles[key])]
