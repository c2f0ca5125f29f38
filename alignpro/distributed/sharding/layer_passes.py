"""Models whose layers are gathered just before they run, in each pass, so that only a few layers are whole at a time.

All ranks gather the same layers in the same order, so a forward pass on one rank involves every rank. A rank without work
of its own takes part in the gathers without computing anything; `Turns` decides which model's pass is next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sharding.partition import Partition, buckets
from alignpro.errors import ModelError


class Turns:
    """Puts the passes of several models into one order on all ranks; every rank either makes or attends each pass.

    To attend a pass is to take part in its gathers without computing anything.

    Args:
        ranks: All ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._models: list[LayerPasses] = []

    def add(self, model: LayerPasses) -> int:
        """Register a model; returns its number, which is the same on all ranks."""
        self._models.append(model)
        return len(self._models)

    def wait(self, number: int) -> None:
        """Attend passes of other models until it is the turn of the model with this number.

        If a pass of this rank has raised an error, its remaining gathers are made first: other ranks wait in them.
        """
        self.ranks.midway = True
        for model in self._models:
            model.finish()
        while (chosen := self.ranks.reduce_max(number)) != number:
            self._models[chosen - 1].attend()

    def attend_all(self) -> None:
        """Attend the passes of other ranks until no rank has one left to make."""
        self.wait(0)
        self.ranks.midway = False


class LayerPasses:
    """Sharded layers that each forward pass gathers in buckets (groups of layers), the next bucket while the current one runs.

    Args:
        layers: The layers in the order in which a pass calls them, once each.
        device: The device where they run.
        ranks: All ranks.
        turns: The order of all layer-wise passes.
        most: Maximum bytes that are gathered at a time, unless two layers take more.
        name: Name of the model, for messages.
    """

    def __init__(
        self, layers: Sequence[nn.Module], device: torch.device, ranks: Ranks, turns: Turns, most: int, name: str
    ) -> None:
        self._turns, self._ranks, self._name, self._device = turns, ranks, name, device
        self._number = turns.add(self)
        self._buckets: list[Partition] = []
        self._memory: tuple[Tensor, Tensor] | None = None
        self._coming: dist.Work | None = None
        self._next = 0
        """Index of the bucket that the current pass runs next."""
        self._begun = 0
        """Number of buckets that the current pass has started to gather."""
        remaining = list(layers)
        for bucket in buckets([list(layer.parameters()) for layer in layers], most // 2):
            first, last = remaining[0], remaining[len(bucket) - 1]
            del remaining[: len(bucket)]
            number = len(self._buckets)
            self._buckets.append(Partition(list(chain.from_iterable(bucket)), device, ranks.rank, ranks.size))
            first.register_forward_pre_hook(lambda *_, n=number: self._enter(n))
            last.register_forward_hook(lambda *_, n=number: self._leave(n))

    @property
    def partitions(self) -> Sequence[Partition]:
        """The partition of each bucket."""
        return self._buckets

    def open(self) -> None:
        """Allocate memory for two buckets."""
        size = max(bucket.nbytes for bucket in self._buckets)
        one, other = (torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2))
        self._memory = one, other

    def close(self) -> None:
        """Free the memory."""
        self._memory = None
        for bucket in self._buckets:
            bucket.release()

    def attend(self) -> None:
        """Take part in the gathers of a pass that other ranks make."""
        for number, bucket in enumerate(self._buckets):
            if coming := bucket.gather(self._half(number)):
                coming.wait()

    def finish(self) -> None:
        """Make the remaining gathers of a pass of this rank that has raised; does nothing after a complete pass."""
        if not self._begun:
            return
        self._arrived()
        while self._begun < len(self._buckets):
            self._begin(self._begun)
            self._arrived()
        for bucket in self._buckets:
            bucket.release()
        self._begun = 0

    def _enter(self, number: int) -> None:
        if number == 0:
            self._turns.wait(self._number)
            self._next = 0
            self._begin(0)
        if number != self._next:
            raise ModelError(f"model {self._name}: its layers do not run in the order of their list: gather it whole")
        self._arrived()
        self._buckets[number].materialize(self._half(number))
        if number + 1 < len(self._buckets):
            # This overwrites the previous bucket, which has run: the collective waits for the kernels launched before it.
            self._begin(number + 1)

    def _leave(self, number: int) -> None:
        self._buckets[number].release()
        self._next = number + 1
        if self._next == len(self._buckets):
            self._begun = 0
            self._ranks.midway = False

    def _begin(self, number: int) -> None:
        self._coming = self._buckets[number].gather(self._half(number))
        self._begun = number + 1

    def _arrived(self) -> None:
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def _half(self, number: int) -> Tensor:
        assert self._memory is not None  # passes run only between `open` and `close`
        return self._memory[number % 2]


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: the `ModuleList` with the most weight elements.

    Raises:
        ModelError: The model has no `ModuleList`.
    """

    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(module).__name__} has no list of layers: it can only be gathered whole")
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))])
