"""Whether a directory holds a finished run: a check that comes before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from alignpro.errors import ModelError


def require_finished_run(run: Path) -> None:
    """Check that a directory has the configuration and the model of a run.

    Raises:
        ModelError: It has not; the message names the directory above it that has, if there is one.
    """
    if _is_finished(run):
        return
    inside = next((parent for parent in run.absolute().parents if _is_finished(parent)), None)
    if inside is not None:
        levels = len(run.absolute().relative_to(inside).parts)
        shown = run.parents[levels - 1] if len(run.parts) > levels else inside
        raise ModelError(f"run directory {run}: is inside the run directory {shown}: give that")
    raise ModelError(
        f"run directory {run}: has no config.yaml and model/: it is not a finished run of `alignpro train` or "
        "`alignpro sft`"
    )


def _is_finished(run: Path) -> bool:
    return (run / "config.yaml").is_file() and (run / "model").is_dir()
