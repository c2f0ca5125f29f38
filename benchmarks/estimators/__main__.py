"""python -m benchmarks.estimators: compare the estimators of the policy's gradient where all sequences can be enumerated.

Bias and variance are exact sums over all pairs of 40 sequences. Samples are those of training on 16 prompts with 121
sequences each, until 95 % of what the optimum gains over the reference is reached. The docs' table comes from its results.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from benchmarks import command
from benchmarks.estimators.gradient import CASES, Case
from benchmarks.estimators.measure import best_training, exact_moments, updated
from benchmarks.estimators.world import World
from benchmarks.session import Session
from benchmarks.table import print_table

POLICIES = {"half": 0.5, "optimum": 1.0, "beyond": 1.5}
"""Half-way to the optimum, there, and half as far again."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)

app = command.new_app()


@app.command(help=__doc__)
def run(
    kl_coef: Annotated[list[float] | None, typer.Option(help="λ; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=10, help="Updates of each training run, with 8 samples per prompt.")] = 1500,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("estimators", device="cpu", dtype=torch.float64, threads=1, quick=quick, file=json_file)
    document: dict[str, Any] = {"run": session.describe(), "steps": 20 if quick else steps, "results": []}
    for coef in kl_coef or [0.1, 0.5]:
        rows = [
            {"kl_coef": coef, "case": case.name, **at_policies(coef, case)}
            | best_training(
                World(2 if quick else 16, coef, vocabulary=4, max_length=4),
                case,
                RATES[:1] if quick else RATES,
                group=8,
                steps=document["steps"],
                seed=0,
            )
            for case in CASES
        ]
        document["results"] += rows
        session.save(document)
        show(session, coef, rows)


def at_policies(kl_coef: float, case: Case) -> dict[str, float]:
    """Bias and cosine away from the path to the optimum, and the variance at several policies."""
    world = World(1, kl_coef, vocabulary=4, max_length=3)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(world.reference.shape, generator=generator, dtype=torch.float64)
    away = (world.tilted(0.5) + 0.5 * noise).log_softmax(-1)
    here = exact_moments(world, away, case)
    later = exact_moments(world, updated(world, away, 0.012), case, drawn_from=away)
    variances = {
        f"variance/{name}": exact_moments(world, world.tilted(strength), case).variance
        for name, strength in POLICIES.items()
    }
    return {
        "bias": here.bias,
        "cosine": here.cosine,
        "bias/second update": later.bias,
        "variance/away": here.variance,
        **variances,
    }


def show(session: Session, kl_coef: float, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    variances = [key for key in rows[0] if key.startswith("variance/")]
    cells = [
        [
            row["case"],
            format(row["bias"], ".2f"),
            format(row["cosine"], ".3f"),
            format(row["bias/second update"], ".2f"),
            *(format(row[key], ".2g") for key in variances),
            _samples(row),
            format(row["remaining"], ".1%"),
            format(row["kl_overshoot"], ".2f"),
        ]
        for row in rows
    ]
    heads = ["estimator", "bias", "cosine", "bias, 2nd", *(key.replace("variance/", "var ") for key in variances)]
    heads += ["samples", "left", "KL/KL*"]
    print_table(session.console, heads, cells, title=f"λ = {kl_coef}")


def markdown(results: list[dict[str, Any]], coefs: tuple[float, ...] = (0.1, 0.5)) -> list[str]:
    """The lines of the table in docs/training.md: bias and samples at each λ, and variances relative to ``exact``."""
    heads = ["estimator", "bias", *POLICIES, "samples to 5 %", "left"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    exact = {row["kl_coef"]: row for row in results if row["case"] == "exact"}
    for case in dict.fromkeys(row["case"] for row in results):
        rows = [next(row for row in results if (row["case"], row["kl_coef"]) == (case, coef)) for coef in coefs]
        ratios = [
            " / ".join(_ratio(row[key], exact[row["kl_coef"]][key]) for row in rows)
            for key in (f"variance/{name}" for name in POLICIES)
        ]
        bias = " / ".join("0" if row["bias"] < 1e-9 else format(row["bias"], ".2f") for row in rows)
        samples = " / ".join(_samples(row) for row in rows)
        left = " / ".join(format(row["remaining"], ".1%") for row in rows)
        lines.append(f"| {' | '.join([f'`{case}`', bias, *ratios, samples, left])} |")
    return lines


def _samples(row: dict[str, Any]) -> str:
    return "never" if row["samples"] is None else f"{row['samples']:,.0f}"


def _ratio(value: float, exact: float) -> str:
    ratio = value / exact
    return "0" if ratio < 1e-9 else format(ratio, ".2f" if ratio < 10 else ".0f")


if __name__ == "__main__":
    app()
