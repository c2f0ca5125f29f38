"""`alignpro mix` and `alignpro pareto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from alignpro.cli.arguments import load_late
from alignpro.errors import ConfigError

_TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Let Python code that comes with the models run, if a run's config says so."
    ),
]


def mix(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN…", help="Run directories of `alignpro train`.")],
    out: Annotated[Path, typer.Option(help="Run directory to write, for `alignpro rewrite` and `alignpro eval`.")],
    weights: Annotated[
        str | None, typer.Option(help="One for each run, of sum 1, such as 0.7,0.3; equal by default.")
    ] = None,
    max_min: Annotated[
        bool, typer.Option("--max-min", help="Find the weights for which the least of the rewards is the largest.")
    ] = False,
    one_model: Annotated[
        bool,
        typer.Option(
            "--one-model",
            help="Of LoRAs of one base model: write one LoRA, which approximates the mixture, and say how well.",
        ),
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts on which the mixture is measured.")] = 32,
    rewrites: Annotated[int, typer.Option(min=2, help="Rewrites of each.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Mix prompters that were trained for different rewards, from one reference with one λ, into one prompter.

    No reward is asked: each prompter is the record of its own.
    """
    found = load_late("alignpro.training.mixing:mix")(
        runs,
        out,
        weights=None if weights is None else _numbers(weights),
        max_min=max_min,
        one_model=one_model,
        prompts=prompts,
        rewrites=rewrites,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    for run, weight, reward in zip(runs, found["weights"], found["normalised_rewards"], strict=True):
        typer.echo(f"{weight:.3f}  {run}  normalised reward {reward:+.4f}")
    gap = found["gap_to_whole_rewrites"]
    typer.echo(
        f"token by token, against whole rewrites: TV {gap['total_variation']:.3f}, KL {gap['kl']:.3f} nats; "
        f"{gap['effective_sample_size']:.1f} of {found['rewrites']} rewrites count"
    )
    if single := found.get("gap_of_one_model"):
        typer.echo(f"one model, against the mixture token by token: KL {single['kl']:.3f} nats")
    typer.echo(str(out))


def pareto(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN", help="Two run directories of `alignpro train`, one for each reward."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write: pareto.json and pareto.png.")],
    trained: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WEIGHT=RUN",
            help="A run that was trained for the weighted sum of both rewards, with the weight of the second; may be repeated.",
        ),
    ] = None,
    mixed: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="What `alignpro mix` has made of both, such as their max-min mixture, as a point; may be repeated.",
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="Of the second run, at which both are mixed.")] = "0,0.25,0.5,0.75,1",
    prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts.")] = 64,
    rewrites: Annotated[int, typer.Option(min=2, help="Rewrites of each.")] = 2,
    responses: Annotated[int, typer.Option(min=2, help="Responses to each rewrite.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of prompts that no run was trained on; may be repeated. By default, those held out.",
        ),
    ] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Compare mixtures of two prompters with prompters that were trained for the weighted sum of both rewards."""
    found = load_late("alignpro.evaluation.pareto:compare_mixtures")(
        runs,
        out,
        trained=_weighted_runs(trained or []),
        mixed=mixed or (),
        weights=_numbers(weights),
        prompts=prompts,
        rewrites=rewrites,
        responses=responses,
        seed=seed,
        data=data or (),
        trust_remote_code=trust_remote_code,
    )
    for each in found["points"]:
        first, second = (_shown(reward) for reward in each["rewards"])
        typer.echo(f"{each['weight']:.2f}  {each['series']}: {first}  {second}  KL {_shown(each['kl'])}")
    for each in found["mixture_above_trained"]:
        typer.echo(
            f"at {each['weight']:.2f}, the mixture less the trained: weighted reward {_shown(each['weighted_reward'])}, "
            f"KL {_shown(each['kl'])}"
        )
    for each in found["mixed"]:
        above = " and ".join(_shown(difference) for difference in each["least_reward_above"])
        typer.echo(f"{each['run']}, at {each['weight']:.3f}: its lower reward is above that of either alone by {above}")
    typer.echo(str(out))


def _weighted_runs(given: list[str]) -> dict[float, Path]:
    found: dict[float, Path] = {}
    for each in given:
        weight, equals, run = each.partition("=")
        try:
            number = float(weight)
        except ValueError:
            equals = ""
        if not equals or not run:
            raise ConfigError(
                f"pareto: --trained {each}: expected the weight of the second reward and a run, such as 0.5=runs/both"
            )
        if number in found:
            raise ConfigError(
                f"pareto: --trained {each}: {found[number]} has this weight already; give one run for each"
            )
        found[number] = Path(run)
    return found


def _shown(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None or estimate["low"] is None:
        return f"{estimate['value']} ({estimate['not_estimable']})"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights {text}: expected numbers with commas between, such as 0.7,0.3") from error
