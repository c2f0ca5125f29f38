"""`alignpro demo`, `plan` and `doctor`: what can be done here, before anything of one's own is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alignpro.cli.arguments import TrainingArguments, load_late
from alignpro.errors import AlignProError


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the runs, the summary, the figure and the report.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    zero: Annotated[
        str, typer.Option(help="DeepSpeed set-up under its launcher: z0, z1, z2, z3, z2_offload or z3_offload.")
    ] = "z2",
) -> None:
    """Train and evaluate on a built-in toy task (minutes on a CPU)."""
    load_late("alignpro.demo.run:run_demo")(out, seed, zero=zero)


def plan(
    arguments: TrainingArguments,
    job: Annotated[str, typer.Option(help="Which command the configuration is for: train or rlhf.")] = "train",
    ranks: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    gib: Annotated[
        float | None, typer.Option(min=0, help="Memory of one device in GiB: adds a column that says what fits.")
    ] = None,
) -> None:
    """Estimate memory per device, arithmetic, and what servers are asked and what that costs, without loading any weights.

    Prints one row for a single process and one per DeepSpeed set-up; docs/launch.md explains the columns.
    """
    if job not in ("train", "rlhf"):
        raise AlignProError(f"--job {job}: expected train or rlhf")
    from alignpro.config import RLHFConfig, TrainConfig, load_config, separate_models
    from alignpro.prompting.pretrained import require_pretrained

    kind: type[TrainConfig | RLHFConfig] = TrainConfig if job == "train" else RLHFConfig
    config = load_config(kind, arguments)
    for model in (config.policy, *(separate_models(config.target) if isinstance(config, TrainConfig) else [])):
        require_pretrained(model.path, ask_hub=False)
    lines = load_late("alignpro.planning.memory_table:memory_table")(
        config, ranks, None if gib is None else gib * 2**30
    )
    typer.echo(
        f"GiB per rank on {ranks} rank{'' if ranks == 1 else 's'}, by formula (docs/launch.md)\n" + "\n".join(lines)
    )
    for what in ("compute:describe_compute", "spending:describe_spending"):
        for line in load_late(f"alignpro.planning.{what}")(config):
            typer.echo(line)


def doctor() -> None:
    """Check the installation: versions, devices, backends."""
    from alignpro.doctor import print_diagnosis  # not through `_load`: it must run when transformers is broken

    print_diagnosis()
