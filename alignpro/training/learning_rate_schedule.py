"""The learning-rate schedule: linear warm-up, then constant, or linear or cosine decay to zero."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alignpro.config import OptimizerConfig


def learning_rate_schedule(optimizer: Optimizer, config: OptimizerConfig, total_updates: int) -> LambdaLR:
    """Create the schedule of an optimizer.

    Args:
        optimizer: Its learning rate is that of ``config``, which the schedule multiplies.
        config: Warm-up and decay.
        total_updates: Optimizer steps in the whole run, at whose end the decay reaches zero.
    """
    return LambdaLR(optimizer, lambda update: learning_rate_factor(update, total_updates, config))


def learning_rate_factor(update: int, total_updates: int, config: OptimizerConfig) -> float:
    """The factor on the learning rate at an update (counted from 0)."""
    if update < config.warmup_steps:
        return (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - config.warmup_steps) / max(1, total_updates - config.warmup_steps))
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def learning_rate(schedule: LambdaLR) -> float:
    """The learning rate of the next update."""
    return float(schedule.optimizer.param_groups[0]["lr"])


def sync_learning_rate(schedule: LambdaLR, factor: float = 1.0) -> float:
    """Set the learning rate of the next update to the schedule's, times a factor, and return it.

    The rate in a checkpoint is that of the run that wrote it, whose schedule was shorter if ``run.steps`` has been raised.
    """
    for group, base, scheduled in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * scheduled(schedule.last_epoch) * factor
    return learning_rate(schedule)


def skip_updates(schedule: LambdaLR, updates: int) -> None:
    """Advance a schedule by a number of updates that are not made."""
    schedule.last_epoch += updates
    sync_learning_rate(schedule)
