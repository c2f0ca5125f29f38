"""Where a run writes, and on which processes it is."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from alignpro.config.section import Section


class RunConfig(Section):
    """The run directory and what is written to it, and when."""

    out: Path
    seed: int = Field(0, ge=0)
    steps: int = Field(100, ge=1)
    eval_every: int = Field(0, ge=0)
    eval_prompts: int = Field(64, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(10, ge=1)
    """Steps between rows of samples.jsonl."""
    tensorboard: bool = True
    wandb_project: str | None = None


class DeepSpeedConfig(Section):
    """How a job is spread over the ranks that the ``deepspeed`` launcher starts; without a launcher it says nothing."""

    config: str = "z2"
    """``z0``, ``z1``, ``z2``, ``z3``, ``z2_offload`` or ``z3_offload`` (launch/zero/), or the path of a JSON file."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a rank waits for the others before the job ends."""
