"""The workload of a model directory: the model is prompter and target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from benchmarks.given_model import shape_of
from benchmarks.workload import Workload, reshape


def workload_of(directory: Path, changes: Sequence[str], *, quick: bool) -> Workload:
    """Return 16 chains of at most 48 + 64 tokens, with changes.

    Args:
        directory: The model.
        changes: As for `reshape`, of the counts and the lengths of rewrites and responses.
        quick: Whether to take a tiny workload.

    Raises:
        typer.BadParameter: There is no such model, or a change is invalid.
    """
    shape = shape_of(directory)
    longest = 4 if quick else 64
    whole = Workload(
        directory.absolute().name,
        shape,
        shape,
        meta_prompt=0,
        prompt=longest,
        rewrite=4 if quick else 48,
        template=0,
        response=longest,
        prompts=2 if quick else 4,
        K=2 if quick else 4,
        M=1,
    )
    changed = reshape(whole, changes)
    if changed.meta_prompt or changed.template or {changed.prompter, changed.target} != {shape}:
        raise typer.BadParameter("shape: with --model, models, template and meta-prompt are those of its directory")
    return changed
