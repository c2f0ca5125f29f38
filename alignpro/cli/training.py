"""`alignpro sft`, `reward`, `train` and `rlhf`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignpro.cli.arguments import At, Resume, TrainingArguments, TrainingDryRun, configure, load_late
from alignpro.errors import AlignProError

if TYPE_CHECKING:
    from alignpro.config import Section


def sft(arguments: TrainingArguments, resume: Resume = False, at: At = None, dry_run: TrainingDryRun = False) -> None:
    """Supervised fine-tuning on rewrites or on responses.

    The data are (prompt, rewrite) pairs, to initialise a prompter, or, with task=response, (prompt, response) pairs, for
    any language model.
    """
    from alignpro.config import SFTConfig

    _train(SFTConfig, arguments, resume, at, dry_run)


def reward(
    arguments: TrainingArguments, resume: Resume = False, at: At = None, dry_run: TrainingDryRun = False
) -> None:
    """Train a Bradley-Terry reward model on preference pairs."""
    from alignpro.config import RewardModelConfig

    _train(RewardModelConfig, arguments, resume, at, dry_run)


def train(arguments: TrainingArguments, resume: Resume = False, at: At = None, dry_run: TrainingDryRun = False) -> None:
    """Train a prompter against a frozen target (RL)."""
    from alignpro.config import TrainConfig

    _train(TrainConfig, arguments, resume, at, dry_run)


def rlhf(arguments: TrainingArguments, resume: Resume = False, at: At = None, dry_run: TrainingDryRun = False) -> None:
    """Train the target itself on the same reward, for comparison.

    This is RLHF of the target: the "oracle" of `alignpro eval`.
    """
    from alignpro.config import RLHFConfig

    _train(RLHFConfig, arguments, resume, at, dry_run)


def _train(kind: type[Section], arguments: list[str], resume: bool, at: int | None, dry_run: bool) -> None:
    if at is not None and not resume:
        raise AlignProError("--at names the checkpoint to continue from: it requires --resume")
    config = configure(kind, arguments, dry_run, resume)
    if config is not None:
        load_late("alignpro.training.jobs:train")(config, resume=resume, from_step=at)
