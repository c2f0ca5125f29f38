"""Frozen models of a job: target, reward models, reference. Whole on each rank, in shards, or in the host's memory.

A model in shards takes 1/n of its memory on each of n ranks between its uses. For a use it is gathered whole; or, within
a budget, all but its layers is, and these are gathered in each pass (`layer_passes`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from alignpro.config import ModelConfig
from alignpro.distributed.host_turn import host_turn
from alignpro.distributed.layer_passes import LayerPasses, Turns, layers_of
from alignpro.distributed.partition import Partition, lots
from alignpro.distributed.ranks import Ranks, lost_ranks
from alignpro.distributed.sampling import GATHERED_BYTES
from alignpro.language_model import LanguageModel
from alignpro.models import resolve_device

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


class FrozenModels:
    """Models that are run and not trained, whole on their device all the time."""

    def load(self, config: ModelConfig, load: Callable[[ModelConfig], M]) -> M:
        """Load one of them.

        Args:
            config: Where it is, and its device.
            load: Does it.
        """
        return load(config)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """For as long as they are run: a collective where they are in shards, at its beginning and its end."""
        yield


class ShardedModels(FrozenModels):
    """Models of which each rank holds a part, and which run inside `ready` alone.

    Args:
        ranks: All ranks.
        most: Bytes of a model's layers that may be gathered at a time; None for all of them, once for each `ready`.
    """

    def __init__(self, ranks: Ranks, most: int | None = None) -> None:
        self._ranks, self._most = ranks, most
        self._turns = Turns(ranks)
        self._resident: list[Partition] = []
        self._passes: list[LayerPasses] = []

    def load(self, config: ModelConfig, load: Callable[[ModelConfig], M]) -> M:
        """Load one of them on the host, for it may be larger than the device, and keep this rank's part on the device.

        The ranks of a host take turns, so that it holds one such model at a time.
        """
        device = resolve_device(config.device)
        with host_turn():
            model = load(config.model_copy(update={"device": "cpu"}))
            self._take(model, device, config.path)
        return model.to(device)

    @property
    def held_bytes(self) -> int:
        """What this rank holds of all of them, outside of `ready`."""
        partitions = [*self._resident, *(lot for model in self._passes for lot in model.partitions)]
        return sum(partition.part.nbytes for partition in partitions)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Gather what is whole throughout; the end waits until no rank has a pass in layers to make any more."""
        try:
            self._open()
            try:
                yield
            except Exception as error:
                if not lost_ranks(error):
                    self._turns.attend_all()  # the others go on, and learn of it afterwards
                raise
            self._turns.attend_all()
        finally:
            for partition in self._resident:
                partition.vacate()
            for model in self._passes:
                model.close()

    def _take(self, model: nn.Module, device: torch.device, name: str) -> None:
        """Keep a part of a whole model."""
        weights = list(model.parameters())
        by_layers = self._most is not None and sum(weight.nbytes for weight in weights) > self._most
        if isinstance(model, LanguageModel):
            model.keep_one_layout()
            model.whole_between_passes = not by_layers
        if by_layers:
            assert self._most is not None
            layers = layers_of(model)
            inside = {id(weight) for layer in layers for weight in layer.parameters()}
            weights = [weight for weight in weights if id(weight) not in inside]
            self._passes.append(LayerPasses(layers, device, self._ranks, self._turns, self._most, name))
            logger.info("%s: gathered by layers in each pass, %d MiB at a time", name, self._most >> 20)
        for lot in lots([[weight] for weight in weights], GATHERED_BYTES):
            self._resident.append(
                Partition([w for unit in lot for w in unit], device, self._ranks.rank, self._ranks.size)
            )

    def _open(self) -> None:
        self._ranks.midway = True
        for partition in self._resident:
            _gather(partition)
        for model in self._passes:
            model.open()
        self._ranks.midway = False


class OffloadedWeights(FrozenModels):
    """Weights that are in the host's memory while they are not used, and whole on each rank's device while they are.

    Args:
        weights: On the device.
        device: Which.
    """

    def __init__(self, weights: list[nn.Parameter], device: torch.device) -> None:
        host = torch.device("cpu")
        self._lots = [
            Partition([w for unit in lot for w in unit], device, 0, 1, home=host)
            for lot in lots([[weight] for weight in weights], GATHERED_BYTES)
        ]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Copy them to the device; no collective."""
        try:
            for lot in self._lots:
                _gather(lot)
            yield
        finally:
            for lot in self._lots:
                lot.vacate()


def _gather(partition: Partition) -> None:
    """Bring a partition together in memory of its own."""
    memory = torch.empty(partition.nbytes, dtype=torch.uint8, device=partition.device)
    if coming := partition.gather(memory):
        coming.wait()
    partition.place(memory)
