"""Frozen models of a job (target, reward models, reference): whole on each rank, sharded, or offloaded to host memory.

A sharded model takes 1/n of its memory on each of n ranks while it is not used, and is gathered whole before use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from alignpro.config import ModelConfig
from alignpro.distributed.host_lock import host_lock
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sharding.gathered_model import GATHERED_BYTES
from alignpro.distributed.sharding.partition import Partition, buckets
from alignpro.errors import ConfigError, TrainingError
from alignpro.models.cpu.replacement import restore_modules
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import resolve_device, resolve_dtype
from alignpro.models.mixture_files import read_mixture

M = TypeVar("M", bound=nn.Module)


class FrozenModels:
    """Models that are run but not trained, and always whole on their device."""

    def load(self, config: ModelConfig, load: Callable[[ModelConfig], M]) -> M:
        """Load a model.

        Args:
            config: The model's path and device.
            load: Loads a model from its configuration.
        """
        return load(config)

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Context inside which the models may be run; entering it is a collective if they are sharded."""
        yield


class ShardedModels(FrozenModels):
    """Models of which each rank holds a shard, and which may be run only inside `materialized`.

    Args:
        ranks: All ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._partitions: list[Partition] = []
        self._names: list[str] = []

    def load(self, config: ModelConfig, load: Callable[[ModelConfig], M]) -> M:
        """Load a model on the host, since it may not fit on the device, and keep this rank's shard on the device.

        The ranks of a host load one after another, so that the host holds only one whole model at a time.
        """
        if read_mixture(config.path) is not None:
            raise ConfigError(
                f"{config.path}: is a mixture of models, whose combined output layer cannot be sharded: write one model with "
                "`alignpro mix --one-model`, or leave it whole (deepspeed.target_stage=0)"
            )
        device = resolve_device(config.device)
        on_host = {"device": "cpu"}
        if device.type != "cpu":
            on_host["dtype"] = str(resolve_dtype(config)).removeprefix("torch.")  # auto is another one on the host
        with host_lock():
            model = load(config.model_copy(update=on_host))
            if isinstance(model, LanguageModel):
                model.disable_packing()
            else:
                restore_modules(model)
            self._partitions += _partitions(model.parameters(), device, self._ranks.rank, self._ranks.size)
            self._names.append(config.path)
        return model.to(device)

    @property
    def held_bytes(self) -> int:
        """Bytes that this rank holds of all models outside `materialized`."""
        return sum(partition.shard.nbytes for partition in self._partitions)

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Gather the models on entry.

        Raises:
            TrainingError: They do not fit in this rank's memory.
            PeerError: They do not fit in that of another rank.
        """
        with self._ranks.raise_together():  # before the gathers, in which a rank without memory would be waited for
            buffers = self._allocate()
        try:
            for partition in self._partitions:
                partition.gather(buffers.pop(0))
            yield
        finally:
            for partition in self._partitions:
                partition.release()

    def _allocate(self) -> list[torch.Tensor]:
        try:
            return [partition.allocate() for partition in self._partitions]
        except RuntimeError as error:  # the only one that an allocation raises: out of memory
            gib = self._ranks.size * self.held_bytes / 2**30
            raise TrainingError(
                f"{', '.join(self._names)}: {gib:.1f} GiB do not fit in memory once gathered from the ranks' shards; take a "
                "smaller model or devices with more memory, or offload the policy (deepspeed.config=z3_offload) or its "
                "reference (deepspeed.offload_reference)"
            ) from error


class OffloadedWeights(FrozenModels):
    """Weights that are in host memory while they are not used, and whole on each rank's device while they are.

    Args:
        weights: Weights on the device.
        device: The device.
    """

    def __init__(self, weights: Iterable[nn.Parameter], device: torch.device) -> None:
        self._partitions = _partitions(weights, device, 0, 1, torch.device("cpu"))

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Copy the weights to the device; not a collective."""
        try:
            for partition in self._partitions:
                partition.gather(partition.allocate())
            yield
        finally:
            for partition in self._partitions:
                partition.release()


def _partitions(
    weights: Iterable[nn.Parameter],
    device: torch.device,
    rank: int,
    size: int,
    shard_device: torch.device | None = None,
) -> list[Partition]:
    """Partition weights in buckets, each of which one collective gathers."""
    return [
        Partition(bucket, device, rank, size, shard_device)
        for bucket in buckets(weights, lambda weight: weight.nbytes, GATHERED_BYTES)
    ]
