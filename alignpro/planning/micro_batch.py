"""``optimizer.micro_batch_size: auto``: the most sequences per pass that fit in memory by the formulas of `alignpro plan`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from alignpro.config import OptimizerConfig, RewardModelConfig, RLHFConfig, RunSection, SFTConfig, TrainConfig
from alignpro.planning.memory import GIB, JobModels, estimate_memory
from alignpro.planning.supervised_memory import supervised_update_bytes

C = TypeVar("C", bound=RunSection)

MARGIN = 0.2
"""Share of the free memory that is left to what the formulas do not count: the allocator's fragmentation, the libraries, and
other programs on the machine."""


@dataclass(frozen=True)
class MicroBatch:
    """A number of sequences per pass, and why it was chosen."""

    size: int
    planned: float
    """Bytes at the peak of an update, by formula."""
    free: float
    """Bytes that were free, of which `MARGIN` is left."""
    whole: bool
    """Whether a pass holds all that a step has."""

    @property
    def fits(self) -> bool:
        """Whether the plan fits; otherwise this is the smallest size."""
        return self.planned <= (1 - MARGIN) * self.free

    def __str__(self) -> str:
        sequences = f"{self.size} sequence{'' if self.size == 1 else 's'} a pass"
        need = f"an update takes {self.planned / GIB:.2f} GiB by formula"
        room = f"{1 - MARGIN:.0%} of the {self.free / GIB:.2f} GiB of free memory"
        if not self.fits:
            return f"{sequences}, the fewest, although {need}, which is more than {room}: expect to run out of memory"
        return f"{sequences}, {'all that a step has' if self.whole else f'the most that fit in {room}'}; {need}"


def choose_micro_batch(
    config: RunSection, setup: str, ranks: int, free: float, models: JobModels | None = None
) -> MicroBatch:
    """Choose the largest micro-batch whose update fits.

    The rollout's memory does not depend on it. Groups of samples of one prompt are split only if one does not fit.

    Args:
        config: The configuration of a training job.
        setup: As `estimate_memory` takes it; `alignpro sft` and `alignpro reward` run in one process.
        ranks: Number of ranks.
        free: Bytes that are free on the device of one rank.
        models: The sizes of the models of `alignpro train` or `rlhf`; measured if None.

    Raises:
        ModelError: A model's configuration cannot be read.
        ConfigError: The DeepSpeed configuration cannot be read.
    """
    sizes, update_bytes = _choices(config, setup, ranks, models)
    room = (1 - MARGIN) * free
    *parts, whole = sizes
    # One pass may take less than two, since there are no gradients of an earlier one beside its activations.
    if not parts or update_bytes(whole) <= room:
        return MicroBatch(whole, update_bytes(whole), free, True)
    size = parts[max(0, bisect_right(parts, room, key=update_bytes) - 1)]
    return MicroBatch(size, update_bytes(size), free, False)


def placed(config: C, device: torch.device) -> C:
    """Return a configuration whose policy is on a device, for which ``auto`` may stand: memory on a CPU is used differently."""
    policy = getattr(config, "policy", None)
    if policy is None:
        return config
    return config.model_copy(update={"policy": policy.model_copy(update={"device": device.type})})


def with_micro_batch(config: C, size: int) -> C:
    """Return a configuration with a micro-batch size."""
    optimizer = getattr(config, "optimizer", None)
    assert isinstance(optimizer, OptimizerConfig)  # which every training job has
    return config.model_copy(update={"optimizer": optimizer.model_copy(update={"micro_batch_size": size})})


def _choices(
    config: RunSection, setup: str, ranks: int, models: JobModels | None
) -> tuple[Sequence[int], Callable[[int], float]]:
    """The sizes to choose from, in ascending order, and the bytes at the peak of an update with each."""
    match config:
        case SFTConfig() | RewardModelConfig():
            return range(1, config.batch_size + 1), supervised_update_bytes(config)
        case TrainConfig():
            group = config.rollout.rewrites_per_prompt
        case RLHFConfig():
            group = config.rollout.responses_per_prompt
        case _:
            raise TypeError(f"{type(config).__name__} is not the configuration of a training job")
    job, sized = config, models or JobModels.of(config)
    prompts = -(-job.rollout.prompts_per_step // ranks)
    groups = -(-prompts // job.objective.minibatches)
    sizes = [*range(1, group), *range(group, groups * group + 1, group)]
    return sizes, lambda size: estimate_memory(with_micro_batch(job, size), setup, ranks, sized).update
