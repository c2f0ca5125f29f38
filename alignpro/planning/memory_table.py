"""The table of `alignpro plan`: memory per rank for each set-up, and the micro-batch that fits."""

from __future__ import annotations

import torch

from alignpro.config import RLHFConfig, TrainConfig
from alignpro.distributed.deepspeed.zero_config import check_ranks
from alignpro.errors import ConfigError, ModelError
from alignpro.models.loading import resolve_device
from alignpro.planning.free_memory import free_memory
from alignpro.planning.memory import GIB, JobModels, MemoryEstimate, estimate_memory, setups_of
from alignpro.planning.micro_batch import MARGIN, choose_micro_batch, placed, with_micro_batch

_STATES = ("weights", "optimizer", "gradients", "buffers", "frozen", "copy", "KV", "activations")
_COLUMNS = ("set-up", "micro-batch", *_STATES, "rollout", "update", "host")


def memory_table(config: TrainConfig | RLHFConfig, ranks: int, device_bytes: float | None = None) -> list[str]:
    """Return the lines of a table: GiB per rank for each set-up that the job can use, and whether it fits.

    Args:
        config: The job's configuration.
        ranks: Number of ranks.
        device_bytes: Memory of one device; if None, the table has no column for whether it fits, and a micro-batch size of
            ``auto`` is chosen for the memory that is free on this machine.

    Raises:
        ModelError: A model's configuration cannot be read.
        ConfigError: The DeepSpeed configuration that the job names cannot be read, there are more ranks than prompts, or
            the micro-batch is to be chosen for a device that is not on this machine.
    """
    check_ranks(config.rollout.prompts_per_step, ranks)
    models, auto = JobModels.of(config), config.optimizer.micro_batch_size == "auto"
    free = device_bytes or 0.0
    if auto and device_bytes is None:
        device = _device(config.policy.device)
        config, free = placed(config, device), free_memory(device)
    lines = ["  ".join(f"{column:>11}" for column in _COLUMNS) + ("" if device_bytes is None else "  fits")]
    for setup in setups_of(config, ranks):
        sized = (
            with_micro_batch(config, choose_micro_batch(config, setup, ranks, free, models).size) if auto else config
        )
        need = estimate_memory(sized, setup, ranks, models)
        line = f"{setup:>11}  {sized.optimizer.rows_per_pass:>11}  {_cells(need)}"
        if device_bytes is not None:
            line += "  yes" if need.peak < device_bytes else "  no"
        lines.append(line)
    if auto:
        where = "of free memory on this machine" if device_bytes is None else "of the device"
        lines.append(
            f"micro-batch: the most sequences a pass whose update fits in {1 - MARGIN:.0%} of the {free / GIB:.1f} GiB {where}"
        )
    return lines


def _cells(need: MemoryEstimate) -> str:
    of = need.training
    values = [of.weights, of.optimizer, of.gradients, of.buffers + of.backward, need.frozen]
    values += [need.sampling_copy + need.gathered_frozen]
    values += [need.cache, need.activations + need.head, need.rollout, need.update, of.host]
    return "  ".join(f"{value / GIB:>11.2f}" for value in values)


def _device(name: str) -> torch.device:
    try:
        return resolve_device(name)
    except ModelError as error:
        raise ConfigError(
            f"optimizer.micro_batch_size=auto: depends on the device's memory, and {error}; or give the memory with --gib"
        ) from error
