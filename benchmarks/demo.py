"""python -m benchmarks.demo: run the demo with several seeds, each in its own process, as a user would.

Prints the table in README.md and writes JSON after every seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import command
from benchmarks.session import Session

HEADER = (
    "| seed | no fine-tuning | SFT prompter | Gibbs, N = 16 | Align-Pro | oracle (RLHF) | gap recovered "
    "| variance between prompts + rewrites + responses, no fine-tuning → Align-Pro | slack of the bound |",
    "|---|---|---|---|---|---|---|---|---|",
)

app = command.new_app()


@app.command(help=__doc__)
def run(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, starting from 0.")] = 5,
    out: Annotated[Path, typer.Option(help="Directory with one demo run per seed; finished runs are reused.")] = Path(
        "runs/bench-demo"
    ),
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("demo", device="auto", file=json_file)  # the device that the demo uses
    document: dict[str, Any] = {"runs": [], "run": session.describe()}
    for seed in range(seeds):
        summary = out / f"seed_{seed}" / "summary.json"
        if not summary.exists():
            demo = [sys.executable, "-m", "alignpro", "demo", "--out", str(summary.parent), "--seed", str(seed)]
            subprocess.run(demo, check=True)
        clipped = {arm: _clipped_share(summary.parent / arm / "metrics.jsonl") for arm in ("align_pro", "oracle")}
        document["runs"].append({"seed": seed, "gradient_clipped": clipped} | json.loads(summary.read_text()))
        session.save(document)
    typer.echo("\n".join([*HEADER, *rows(document["runs"])]))
    typer.echo(f"seconds: {', '.join(format(each['seconds'], '.0f') for each in document['runs'])}  {session.file}")


def _clipped_share(metrics: Path) -> float:
    """The share of a run's steps whose gradient was longer than ``max_grad_norm``."""
    steps = [json.loads(line)["gradient_clipped"] for line in metrics.read_text().splitlines()]
    return sum(steps) / len(steps)


def rows(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table below `HEADER`."""
    return [_row(each) for each in runs]


def _row(summary: Mapping[str, Any]) -> str:
    means = {arm: format(summary[arm]["mean"], ".3f") for arm in ("no_finetuning", "sft_prompter", "gibbs", "oracle")}
    before, after = (_parts(summary[arm]["variance_parts"]) for arm in ("no_finetuning", "align_pro"))
    cells = [
        str(summary["seed"]),
        means["no_finetuning"],
        means["sft_prompter"],
        means["gibbs"],
        f"**{summary['align_pro']['mean']:.3f}**",
        means["oracle"],
        _share(summary),
        f"{before} → {after}",
        f"{summary['bound']['rhs'] - summary['bound']['lhs']:.3f}".replace("-", "−"),
    ]
    return f"| {' | '.join(cells)} |"


def _share(summary: Mapping[str, Any]) -> str:
    """The share of the gap with its 95 % interval, or that it is not estimable."""
    value, (low, high) = summary["gap_recovered"], summary["gap_recovered_ci95"]
    if value is None or low is None or high is None:
        return "not estimable"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")


def _parts(variance: Mapping[str, float]) -> str:
    return " + ".join(f"{variance[part]:.3f}" for part in ("prompts", "rewrites", "responses")).replace("-", "−")


if __name__ == "__main__":
    app()
