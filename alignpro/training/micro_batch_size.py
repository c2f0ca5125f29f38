"""The number that ``optimizer.micro_batch_size: auto`` stands for in a run: chosen once, recorded, and kept on ``--resume``."""

from __future__ import annotations

import logging
from typing import TypeVar

from alignpro.config import ModelConfig, OptimizerConfig, RewardModelConfig, RunSection
from alignpro.distributed.ranks import Ranks
from alignpro.models.loading import resolve_device
from alignpro.planning.free_memory import free_memory
from alignpro.planning.micro_batch import choose_micro_batch, placed, with_micro_batch
from alignpro.training.recorded_holdout import recorded_section
from alignpro.training.run import Run

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=RunSection)


def keep_micro_batch_size(config: C, ranks: Ranks) -> C:
    """Replace ``auto`` by the number that the run directory records, if it does; a collective.

    Results are then those of the run without interruption, whatever memory this machine has.

    Raises:
        ConfigError: The run's config.yaml cannot be read.
    """
    if not _is_auto(config):
        return config
    recorded = ranks.on_rank_zero(lambda: recorded_section(config.run.out, "optimizer")) or {}
    size = recorded.get("micro_batch_size", "auto")
    if not isinstance(size, int) or size < 1:
        return config
    logger.info("optimizer.micro_batch_size=auto: %d, as %s records", size, config.run.out / "config.yaml")
    return with_micro_batch(config, size)


def settle_micro_batch_size(config: C, run: Run, setup: str) -> C:
    """Replace ``auto`` by the number that fits on all ranks, log why, and record it in the run's directory; a collective.

    Args:
        config: The job's configuration.
        run: Its open run.
        setup: As `choose_micro_batch` takes it.

    Raises:
        ModelError: A model's configuration cannot be read, or its device cannot be used.
        ConfigError: The DeepSpeed configuration cannot be read.
    """
    if not _is_auto(config):
        return config
    ranks = run.ranks
    with ranks.raise_together():
        device = resolve_device(_trained(config).device)
        chosen = choose_micro_batch(placed(config, device), setup, ranks.size, free_memory(device))
    smallest = -ranks.reduce_max(-chosen.size)
    if smallest < chosen.size:
        logger.info("optimizer.micro_batch_size=auto: %d sequences a pass, the most that fit on all ranks", smallest)
    else:
        level = logging.INFO if chosen.fits else logging.WARNING
        logger.log(level, "optimizer.micro_batch_size=auto: %s", chosen)
    config = with_micro_batch(config, smallest)
    run.record(config)
    return config


def _is_auto(config: RunSection) -> bool:
    optimizer = getattr(config, "optimizer", None)
    return isinstance(optimizer, OptimizerConfig) and optimizer.micro_batch_size == "auto"


def _trained(config: RunSection) -> ModelConfig:
    """The section of the model that a job trains."""
    section = config.model if isinstance(config, RewardModelConfig) else getattr(config, "policy", None)
    assert isinstance(section, ModelConfig)
    return section
