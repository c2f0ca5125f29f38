"""Where a run writes, and on which processes it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    target_stage: Literal[0, 3] = 0
    """0: the frozen target is whole on each rank; 3: each rank holds a part, and it is gathered for each rollout."""
    reward_stage: Literal[0, 3] = 0
    """Likewise the reward models, which are gathered to score."""
    gathered_bytes: int | None = Field(None, ge=1)
    """A target or reward model in parts that is larger is not gathered whole, but layer by layer in each pass: about so
    many bytes of its layers at a time. Whole, whatever its size, when absent."""
    offload_reference: bool = False
    """The reference, where it is a model of its own and not in parts, waits in the host's memory while it is not used."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a rank waits for the others before the job ends."""
