"""The run directory, the base of the configurations that have one, and the distribution over processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from alignpro.config.data import DataConfig
from alignpro.config.section import OutputPath, Section


class RunConfig(Section):
    """The run directory, and what is written to it how often."""

    out: OutputPath
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(100, ge=1)
    eval_every: int = Field(0, ge=0)
    eval_prompts: int = Field(64, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    sample_every: int = Field(10, ge=1)
    """Number of steps between rows of samples.jsonl."""
    select: Literal["best", "last"] | None = None
    """Which checkpoint becomes ``model/``: the one with the best objective on ``data.validation``, if the last is worse by more
    than the noise of their difference, or always the last. None: the best where a reinforcement learning run evaluates itself on
    such prompts."""
    tensorboard: bool = True
    wandb_project: str | None = None


class RunSection(Section):
    """The base class of the configurations of jobs that train: they have a section ``run``."""

    run: RunConfig
    data: DataConfig

    @property
    def selects_best(self) -> bool:
        """Whether ``model/`` is the best checkpoint by the run's own evaluations."""
        return False

    @model_validator(mode="after")
    def _check_selection(self) -> RunSection:
        if self.run.select == "best" and not self.selects_best:
            raise ValueError(
                "run.select=best: it takes `alignpro train` or `rlhf` with run.eval_every and data.validation, the share of "
                "prompts to choose by: those that `alignpro eval` reports must not be chosen by"
            )
        return self


class SelectingSection(RunSection):
    """The base class of those that may export their best checkpoint."""

    @property
    def selects_best(self) -> bool:
        """Whether ``model/`` is the best checkpoint by the objective on ``data.validation``."""
        evaluated = self.run.eval_every > 0 and self.data.validation > 0
        return evaluated and self.run.select != "last"


class DeepSpeedConfig(Section):
    """How a job is distributed over the ranks started by the ``deepspeed`` launcher; ignored without the launcher."""

    config: str = "z2"
    """``z0``, ``z1``, ``z2``, ``z3``, ``z2_offload`` or ``z3_offload`` (launch/zero/), or the path of a JSON file."""
    target_stage: Literal[0, 3] = 0
    """0: every rank holds the whole frozen target. 3: it is sharded over the ranks and gathered whole for each rollout."""
    reward_stage: Literal[0, 3] = 0
    """The same for the reward models; stage 3 gathers them for scoring."""
    offload_reference: bool = False
    """Whether the reference, if it is a separate, unsharded model, is kept in host memory while it is not used."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a rank waits for the others before the job ends."""

    @model_validator(mode="before")
    @classmethod
    def _ignore_retired_key(cls, given: Any) -> Any:
        """Ignore ``gathered_bytes`` without a value, which is in the config.yaml of runs made before it was removed."""
        if isinstance(given, dict) and given.get("gathered_bytes", ...) is None:
            return {key: value for key, value in given.items() if key != "gathered_bytes"}
        return given
