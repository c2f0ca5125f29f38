"""python -m benchmarks.step_size: train at learning rates over decades, with the limit on a step's KL and without.

The prompter is the demo's, or that of a configuration of `alignpro train`. Each training runs in a process of its own and is
resumed if it was interrupted. J is the reward − λ KL of its last tenth of steps, whose prompts are seen for the first time where
there are enough of them, with the standard error over steps. A step's KL is measured in both cases; without a limit, that is one
that nothing exceeds.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from alignpro.demo import world
from alignpro.demo.run import HERE, TRAINING_PROMPTS, WEIGHTS
from benchmarks import command
from benchmarks.session import Session
from benchmarks.table import print_table

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
NO_LIMIT = 1e9
"""Nats per sequence."""
WITHIN = 0.05
"""Of the best J: what counts as having reached it."""

app = command.new_app()


@app.command(help=__doc__)
def run(
    rate: Annotated[list[float] | None, typer.Option(help="Learning rate; may be repeated.")] = None,
    limit: Annotated[list[float] | None, typer.Option(help="objective.step_kl; may be repeated. 0: no limit.")] = None,
    config: Annotated[Path | None, typer.Option(help="Of `alignpro train`; by default the demo's.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Steps of each training; by default the configuration's.")
    ] = None,
    threads: command.Threads = None,
    out: Annotated[Path, typer.Option(help="Directory of the runs; finished ones are reused.")] = Path(
        "runs/bench-step-size"
    ),
    name: Annotated[str, typer.Option(help="Of the results file.")] = "step_size",
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("step_size", device="auto", threads=threads, quick=quick, file=json_file, name=name)
    document: dict[str, Any] = {"run": session.describe(), "results": []}
    common = [str(config)] if config else demo_arguments(out)
    common += [f"run.steps={4 if quick else steps}"] if quick or steps else []
    for each in RATES[3:5] if quick else rate or RATES:
        for nats in (limit or [0.2, 0.0])[: 1 if quick else None]:
            directory = out / f"rate_{each:g}" / (f"limit_{nats:g}" if nats else "no_limit")
            settings = [
                f"run.out={directory}",
                f"optimizer.learning_rate={each!r}",
                f"objective.step_kl={nats or NO_LIMIT}",
            ]
            train(directory, [*common, *settings])
            row = {"learning_rate": each, "step_kl": nats or None} | outcome(directory)
            document["results"].append(row)
            session.save(document)
    rows = document["results"]
    reached = {nats: reached_over(rows, nats) for nats in dict.fromkeys(row["step_kl"] for row in rows)}
    document["reached_over_decades"] = [{"step_kl": nats, "decades": each} for nats, each in reached.items()]
    session.save(document)
    keys = list(rows[0])
    print_table(session.console, keys, [[_cell(row[key]) for key in keys] for row in rows], left=0, title="step size")
    session.finish()


def demo_arguments(out: Path) -> list[str]:
    """The demo's training: its configuration, with prompts and models."""
    prompts = out / "prompts.jsonl"
    if not prompts.exists():
        out.mkdir(parents=True, exist_ok=True)
        world.write_records(prompts, world.prompt_records(TRAINING_PROMPTS, 0, heldout=False))
    models = [f"policy.path={WEIGHTS / 'prompter'}", f"target.path={WEIGHTS / 'target'}"]
    return [str(HERE / "train.yaml"), f"data.source={prompts}", *models]


def train(directory: Path, arguments: Sequence[str]) -> None:
    """Train, or go on with it; a finished run is left as it is."""
    resume = ["--resume"] if directory.exists() else []
    subprocess.run([sys.executable, "-m", "alignpro", "train", *arguments, *resume], check=True)


def outcome(directory: Path) -> dict[str, Any]:
    """What a training reached, how far its steps went, and what measuring that took."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    coef = rows[-1]["kl_coef"]
    values = [row["reward/mean"] - coef * row["kl"] for row in rows]
    last = values[-max(2, len(values) // 10) :]
    return {
        "steps": len(rows),
        "J": statistics.fmean(last),
        "J_stderr": statistics.stdev(last) / len(last) ** 0.5,
        "J_start": values[0],
        "KL": statistics.fmean(row["kl"] for row in rows[-len(last) :]),
        "step_KL_median": statistics.median(row["kl_step"] for row in rows),
        "step_KL_max": max(row["kl_step"] for row in rows),
        "factor_least": min(row["learning_rate_factor"] for row in rows),
        "seconds": sum(value for row in rows for key, value in row.items() if key in _PHASES),
    }


_PHASES = ("seconds/rollout", "seconds/reward", "seconds/credit", "seconds/update")


def reached_over(rows: Sequence[Mapping[str, Any]], limit: float | None) -> float:
    """The longest run of neighbouring rates, in decades, whose J is within `WITHIN` of the best of all rows."""
    best = max(row["J"] for row in rows)
    own = sorted((row["learning_rate"], row["J"]) for row in rows if row["step_kl"] == limit)
    longest, first = 0.0, None
    for rate, value in own:
        first = (first or rate) if value >= best - WITHIN * abs(best) else None
        longest = max(longest, math.log10(rate / first) if first else 0.0)
    return longest


def _cell(value: Any) -> str:
    return "" if value is None else format(value, ".3g")


if __name__ == "__main__":
    app()
