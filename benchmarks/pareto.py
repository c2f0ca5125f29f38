"""python -m benchmarks.pareto: mixtures of two prompters against one prompter for each weighted sum of their rewards, exactly.

Every rewrite of 64 prompts is enumerated (121 sequences each), with two independent rewards. One prompter is trained for each
reward, and mixed afterwards at any weights; one more is trained for each weighted sum. All take the same number of exact
gradient steps, so that nothing is noise but the choice of prompts, over which the intervals are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from alignpro.theory import mixture_policy
from alignpro.theory.statistics import Estimate, mean_estimate, paired_estimate
from benchmarks import command
from benchmarks.estimators.world import World
from benchmarks.figure import new_figure
from benchmarks.session import Session
from benchmarks.table import print_table

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the second reward."""
UPDATES = (10, 40, 400)
"""Gradient steps of each training, from far from the optimum to near it."""
RATE = 0.05
SERIES = {"mixture": "#0072B2", "token by token": "#E69F00", "trained": "#555555"}
"""The two ways to sample a mixture, and the prompters that are trained for the weighted sum; their colours."""

app = command.new_app()


@app.command(help=__doc__)
def run(
    kl_coef: Annotated[float, typer.Option(help="λ.")] = 0.2,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("pareto", device="cpu", dtype=torch.float64, threads=1, quick=quick, file=json_file)
    world = World(4 if quick else 64, kl_coef, vocabulary=4, max_length=4)
    other = World(len(world.rewards), kl_coef, vocabulary=4, max_length=4, seed=1).rewards
    document: dict[str, Any] = {
        "run": session.describe(kl_coef=kl_coef, prompts=len(other), sequences=other.shape[1], rate=RATE),
        "results": frontier(world, other, (2, 4) if quick else UPDATES),
    }
    session.save(document)
    _draw(session, document["results"])
    _show(session, document["results"])
    session.finish()


def frontier(world: World, other: Tensor, counts: Sequence[int]) -> list[dict[str, Any]]:
    """The rewards of mixtures and of trained prompters at each weight, after numbers of steps of each training.

    Args:
        world: Has the first reward.
        other: (P, S) the second.
        counts: Steps of each training, ascending.
    """
    rewards = torch.stack([world.rewards, other])  # (2, P, S)
    simplex = {each: torch.tensor([1.0 - each, each], dtype=torch.float64) for each in WEIGHTS}
    wanted = {each: torch.tensordot(weights, rewards, dims=1) for each, weights in simplex.items()}
    found = {each: trained(world, sums, counts) for each, sums in wanted.items()}
    rows = []
    for i, updates in enumerate(counts):
        ends = torch.stack([found[weight][i] for weight in (0.0, 1.0)])  # (2, P, n, V)
        sequences = torch.stack([world.sequence_logprob(each) for each in ends])
        for weight, weights in simplex.items():
            mixed = torch.tensordot(weights, ends, dims=1).log_softmax(-1)
            policies = {
                "mixture": mixture_policy(world.reference_logprob, sequences, weights),
                "token by token": world.sequence_logprob(mixed),
                "trained": world.sequence_logprob(found[weight][i]),
            }
            reached = {name: _objective(world, each, wanted[weight]) for name, each in policies.items()}
            rows += [
                {
                    "updates": updates,
                    "weight": weight,
                    "series": name,
                    "rewards": [mean_estimate((logprob.exp() * each).sum(-1).numpy()).as_dict() for each in rewards],
                    "objective": reached[name].mean().item(),
                    "above_trained": paired_estimate(reached[name].numpy(), reached["trained"].numpy()).as_dict(),
                }
                for name, logprob in policies.items()
            ]
    return rows


def trained(world: World, rewards: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """log ρ(.|s) after numbers of exact gradient steps of Adam on J from ρ_sft, (P, n, V) each.

    Args:
        world: Has ρ_sft and λ.
        rewards: (P, S).
        counts: Numbers of steps, ascending.
    """
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    found = []
    for step in range(1, counts[-1] + 1):
        optimizer.zero_grad()
        loss = -_objective(world, world.sequence_logprob(logits.log_softmax(-1)), rewards).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        if step in counts:
            found.append(logits.detach().log_softmax(-1))
    return found


def _objective(world: World, logprob: Tensor, rewards: Tensor) -> Tensor:
    """J of each prompt, (P,)."""
    return (logprob.exp() * (rewards - world.kl_coef * (logprob - world.reference_logprob))).sum(-1)


def markdown(results: list[dict[str, Any]]) -> list[str]:
    """The lines of the table in docs/mixtures.md: J of mixtures at equal weights against the prompter trained for the sum."""
    lines = ["| updates of each training | J, trained for the sum | mixture, less that | token by token, less that |"]
    lines.append("|---" * 4 + "|")
    for updates in dict.fromkeys(row["updates"] for row in results):
        rows = {r["series"]: r for r in results if (r["updates"], r["weight"]) == (updates, 0.5)}
        cells = [_told(Estimate.from_dict(rows[name]["above_trained"])) for name in ("mixture", "token by token")]
        lines.append(f"| {updates} | {rows['trained']['objective']:.4f} | {' | '.join(cells)} |")
    return lines


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:+.2g} [{estimate.low:+.2g}, {estimate.high:+.2g}]"


def _draw(session: Session, results: list[dict[str, Any]]) -> None:
    counts = list(dict.fromkeys(row["updates"] for row in results))
    with new_figure(session.figure, (8.4, 3.2), "Mixtures against prompters trained for the weighted sum") as figure:
        for axes, updates in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
            for name, color in SERIES.items():
                rows = [row for row in results if (row["updates"], row["series"]) == (updates, name)]
                first, second = ([Estimate.from_dict(row["rewards"][k]) for row in rows] for k in (0, 1))
                axes.errorbar(
                    [each.value for each in first],
                    [each.value for each in second],
                    xerr=[each.high - each.value for each in first],
                    yerr=[each.high - each.value for each in second],
                    color=color,
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    elinewidth=0.4,
                    label=name,
                )
            axes.set_title(f"after {updates} updates")
            axes.set_xlabel("first reward")
            axes.set_ylabel("second reward")
        axes.legend()


def _show(session: Session, results: list[dict[str, Any]]) -> None:
    cells = [
        [
            f"{row['updates']}",
            f"{row['weight']:.2f}",
            row["series"],
            *(f"{each['value']:.3f}" for each in row["rewards"]),
            f"{row['objective']:.4f}",
            _told(Estimate.from_dict(row["above_trained"])),
        ]
        for row in results
    ]
    heads = ["updates", "weight", "series", "first", "second", "J", "above the trained"]
    print_table(session.console, heads, cells, left=0, title="Mixtures of two prompters")


if __name__ == "__main__":
    app()
