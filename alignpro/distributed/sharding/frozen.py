"""Frozen models of a job (target, reward models, reference): whole on each rank, sharded, or offloaded to host memory.

A sharded model takes 1/n of its memory on each of n ranks while it is not used. Before use it is gathered whole; or, to
stay within a memory budget, everything but its layers is gathered, and the layers are gathered during each pass
(`layer_passes`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from alignpro.config import ModelConfig
from alignpro.distributed.host_lock import host_turn
from alignpro.distributed.ranks import Ranks, lost_ranks
from alignpro.distributed.sharding.gathered_model import GATHERED_BYTES
from alignpro.distributed.sharding.layer_passes import LayerPasses, Turns, layers_of
from alignpro.distributed.sharding.partition import Partition, buckets
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import resolve_device

logger = logging.getLogger(__name__)

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
        """Context inside which the models may be run; a collective on entry and on exit if they are sharded."""
        yield


class ShardedModels(FrozenModels):
    """Models of which each rank holds a part, and which may be run only inside `ready`.

    Args:
        ranks: All ranks.
        most: Maximum bytes of a model's layers that are gathered at a time; None gathers all, once per `ready`.
    """

    def __init__(self, ranks: Ranks, most: int | None = None) -> None:
        self._ranks, self._most = ranks, most
        self._turns = Turns(ranks)
        self._resident: list[Partition] = []
        self._passes: list[LayerPasses] = []

    def load(self, config: ModelConfig, load: Callable[[ModelConfig], M]) -> M:
        """Load a model on the host, since it may not fit on the device, and keep this rank's part on the device.

        The ranks of a host take turns, so that the host holds only one whole model at a time.
        """
        device = resolve_device(config.device)
        with host_turn():
            model = load(config.model_copy(update={"device": "cpu"}))
            self._take(model, device, config.path)
        return model.to(device)

    @property
    def held_bytes(self) -> int:
        """Bytes that this rank holds of all models outside `ready`."""
        partitions = [*self._resident, *(bucket for model in self._passes for bucket in model.partitions)]
        return sum(partition.part.nbytes for partition in partitions)

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Gather the weights that stay whole; on exit, wait until no rank has a layer-wise pass left to make."""
        try:
            self._open()
            try:
                yield
            except Exception as error:
                if not lost_ranks(error):
                    self._turns.attend_all()  # the other ranks continue, and learn of the error afterwards
                raise
            self._turns.attend_all()
        finally:
            for partition in self._resident:
                partition.release()
            for model in self._passes:
                model.close()

    def _take(self, model: nn.Module, device: torch.device, name: str) -> None:
        """Shard a whole model, and keep this rank's part."""
        weights = list(model.parameters())
        by_layers = self._most is not None and sum(weight.nbytes for weight in weights) > self._most
        if isinstance(model, LanguageModel):
            model.disable_packing()
            model.whole_between_passes = not by_layers
        if by_layers:
            assert self._most is not None
            layers = layers_of(model)
            inside = {id(weight) for layer in layers for weight in layer.parameters()}
            weights = [weight for weight in weights if id(weight) not in inside]
            self._passes.append(LayerPasses(layers, device, self._ranks, self._turns, self._most, name))
            logger.info("%s: layers are gathered during each pass, %d MiB at a time", name, self._most >> 20)
        for bucket in buckets([[weight] for weight in weights], GATHERED_BYTES):
            self._resident.append(
                Partition([w for unit in bucket for w in unit], device, self._ranks.rank, self._ranks.size)
            )

    def _open(self) -> None:
        self._ranks.midway = True
        for partition in self._resident:
            _gather(partition)
        for model in self._passes:
            model.open()
        self._ranks.midway = False


class OffloadedWeights(FrozenModels):
    """Weights that are in host memory while they are not used, and whole on each rank's device while they are.

    Args:
        weights: Weights on the device.
        device: The device.
    """

    def __init__(self, weights: list[nn.Parameter], device: torch.device) -> None:
        host = torch.device("cpu")
        self._buckets = [
            Partition([w for unit in bucket for w in unit], device, 0, 1, home=host)
            for bucket in buckets([[weight] for weight in weights], GATHERED_BYTES)
        ]

    @contextmanager
    def materialized(self) -> Iterator[None]:
        """Copy the weights to the device; not a collective."""
        try:
            for bucket in self._buckets:
                _gather(bucket)
            yield
        finally:
            for bucket in self._buckets:
                bucket.release()


def _gather(partition: Partition) -> None:
    """Gather a partition into newly allocated memory."""
    memory = torch.empty(partition.nbytes, dtype=torch.uint8, device=partition.device)
    if coming := partition.gather(memory):
        coming.wait()
    partition.materialize(memory)
