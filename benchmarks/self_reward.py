"""python -m benchmarks.self_reward: what exact iterations of calibrated self-reward gain, where everything is enumerated.

1,000 prompts with 16 candidates of one sentence each. Log-probabilities of ρ_0 are standard normal before they are normalised;
the rewards are uniform in [0, 1], their order correlated with that of likelihoods as a Gaussian copula says. Each iteration is
the optimum for its scores with the KL to the policy before it. Intervals are over prompts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from alignpro.theory import expected_reward, self_reward_iterations
from alignpro.theory.statistics import Estimate, mean_estimate, paired_estimate
from benchmarks import command
from benchmarks.figure import new_figure
from benchmarks.session import Session
from benchmarks.table import print_table

ALPHAS = (0.0, 0.5, 0.9, 1.0)
CORRELATIONS = (0.0, 0.5)
"""Of the Gaussians behind likelihoods and rewards: likelihood says nothing of reward, or something."""
ITERATIONS = 16
COLORS = ("#B3261E", "#E69F00", "#0072B2", "#555555")

app = command.new_app()


@app.command(help=__doc__)
def run(
    kl_coef: Annotated[float, typer.Option(help="λ, for scores in [0, 1].")] = 0.5,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("self_reward", device="cpu", dtype=torch.float64, threads=1, quick=quick, file=json_file)
    prompts = 20 if quick else 1000
    document: dict[str, Any] = {
        "run": session.describe(kl_coef=kl_coef, prompts=prompts, candidates=16),
        "results": [row for each in CORRELATIONS for row in iterations(*worlds(prompts, each), each, kl_coef)],
    }
    session.save(document)
    _draw(session, document["results"])
    heads = ["correlation", "α", *(f"{i}" for i in range(0, ITERATIONS + 1, 2))]
    cells = [
        [f"{row['correlation']}", f"{row['alpha']}", *(f"{each['value']:.3f}" for each in row["rewards"][::2])]
        for row in document["results"]
    ]
    print_table(session.console, heads, cells, left=0, title="Mean reward after each iteration")
    session.finish()


def worlds(prompts: int, correlation: float, candidates: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log ρ_0 and rewards, (P, C) float64 each."""
    generator = torch.Generator().manual_seed(seed)
    normal, noise = torch.randn(2, prompts, candidates, generator=generator, dtype=torch.float64)
    mixed = correlation * normal + (1 - correlation**2) ** 0.5 * noise
    return normal.log_softmax(-1), torch.special.ndtr(mixed)


def iterations(logprob: Tensor, rewards: Tensor, correlation: float, kl_coef: float) -> list[dict[str, Any]]:
    """For each α, the mean reward of ρ_0, ρ_1, …, what each iteration gains, and the entropy."""
    rows = []
    for alpha in ALPHAS:
        policies = self_reward_iterations(logprob, rewards, alpha, kl_coef, ITERATIONS)
        reached = [expected_reward(each, rewards).numpy() for each in policies]
        rows.append(
            {
                "correlation": correlation,
                "alpha": alpha,
                "rewards": [mean_estimate(each).as_dict() for each in reached],
                "gains": [paired_estimate(after, before).as_dict() for before, after in pairwise(reached)],
                "entropy": [-(each.exp() * each).sum(-1).mean().item() for each in policies],
            }
        )
    return rows


def markdown(results: list[dict[str, Any]], shown: tuple[int, ...] = (1, 2, 4, 16)) -> list[str]:
    """The lines of the table in docs/self_reward.md: what iterations gain."""
    heads = ["likelihood and reward", "α", "before", *(f"gain of iteration {i}" for i in shown), "after"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in results:
        means = [f"{row['rewards'][i]['value']:.3f}" for i in (0, -1)]
        gains = [_told(Estimate.from_dict(row["gains"][i - 1])) for i in shown]
        related = "independent" if row["correlation"] == 0 else f"correlated, {row['correlation']:g}"
        lines.append(f"| {' | '.join([related, format(row['alpha'], 'g'), means[0], *gains, means[1]])} |")
    return lines


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _draw(session: Session, results: list[dict[str, Any]]) -> None:
    title = "Mean reward over exact iterations of self-reward"
    with new_figure(session.figure, (7.4, 3.0), title) as figure:
        for axes, correlation in zip(figure.subplots(1, len(CORRELATIONS), sharey=True), CORRELATIONS, strict=True):
            for row, color in zip((r for r in results if r["correlation"] == correlation), COLORS, strict=True):
                means = [Estimate.from_dict(each) for each in row["rewards"]]
                axes.errorbar(
                    range(len(means)),
                    [each.value for each in means],
                    yerr=[each.high - each.value for each in means],
                    color=color,
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    label=f"α = {row['alpha']:g}",
                )
            axes.set_title("likelihood says nothing" if correlation == 0 else f"correlation {correlation:g}")
            axes.set_xlabel("iteration")
        axes.legend()


if __name__ == "__main__":
    app()
