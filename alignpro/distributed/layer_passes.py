"""A model of which only a few layers are whole at a time: gathered just before they run, in each pass.

All ranks gather the same layers in the same order, so a pass on one rank takes a pass on every rank. One that has no work
of its own takes part without computing anything; `Turns` decides whose pass is next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignpro.distributed.partition import Partition, lots
from alignpro.distributed.ranks import Ranks
from alignpro.errors import ModelError


class Turns:
    """Passes of several models on all ranks, one after another: every rank makes or attends each.

    Args:
        ranks: All ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._models: list[LayerPasses] = []

    def add(self, model: LayerPasses) -> int:
        """Know a model; returns its number, which is the same on all ranks."""
        self._models.append(model)
        return len(self._models)

    def wait(self, number: int) -> None:
        """Come back when it is the turn of a pass of one's own; those of others are attended until then.

        Where an own pass has raised, it is finished first: the others are in it.
        """
        self.ranks.midway = True
        for model in self._models:
            model.finish()
        while (chosen := self.ranks.most(number)) != number:
            self._models[chosen - 1].attend()

    def attend_all(self) -> None:
        """Attend the passes of others until no rank has one to make."""
        self.wait(0)
        self.ranks.midway = False


class LayerPasses:
    """Layers in shards, gathered lot by lot as a forward pass comes to them; the next lot while one computes.

    Args:
        layers: Called once in a pass, one after another.
        device: Where they run.
        ranks: All ranks.
        turns: Of all passes in layers.
        most: Bytes that may be gathered at a time; two layers are in any case.
        name: Of the model, for messages.
    """

    def __init__(
        self, layers: Sequence[nn.Module], device: torch.device, ranks: Ranks, turns: Turns, most: int, name: str
    ) -> None:
        self._turns, self._ranks, self._name, self._device = turns, ranks, name, device
        self._number = turns.add(self)
        self._lots: list[Partition] = []
        self._memory: tuple[Tensor, Tensor] | None = None
        self._coming: dist.Work | None = None
        self._next = 0
        """The lot that a pass comes to next."""
        self._begun = 0
        """Lots that the pass under way has begun to gather."""
        remaining = list(layers)
        for lot in lots([list(layer.parameters()) for layer in layers], most // 2):
            first, last = remaining[0], remaining[len(lot) - 1]
            del remaining[: len(lot)]
            number = len(self._lots)
            self._lots.append(Partition(list(chain.from_iterable(lot)), device, ranks.rank, ranks.size))
            first.register_forward_pre_hook(lambda *_, n=number: self._enter(n))
            last.register_forward_hook(lambda *_, n=number: self._leave(n))

    @property
    def partitions(self) -> Sequence[Partition]:
        """What is kept here of each lot."""
        return self._lots

    def open(self) -> None:
        """Take the memory of two lots."""
        size = max(lot.nbytes for lot in self._lots)
        one, other = (torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2))
        self._memory = one, other

    def close(self) -> None:
        """Give it back."""
        self._memory = None
        for lot in self._lots:
            lot.vacate()

    def attend(self) -> None:
        """Take part in a pass that other ranks make."""
        for number, lot in enumerate(self._lots):
            if coming := lot.gather(self._half(number)):
                coming.wait()

    def finish(self) -> None:
        """Gather what an own pass that has raised did not come to; nothing is computed. After a whole pass it does nothing."""
        if not self._begun:
            return
        self._arrived()
        while self._begun < len(self._lots):
            self._begin(self._begun)
            self._arrived()
        for lot in self._lots:
            lot.vacate()
        self._begun = 0

    def _enter(self, number: int) -> None:
        if number == 0:
            self._turns.wait(self._number)
            self._next = 0
            self._begin(0)
        if number != self._next:
            raise ModelError(f"model {self._name}: its layers do not run one after another: gather it whole")
        self._arrived()
        self._lots[number].place(self._half(number))
        if number + 1 < len(self._lots):
            # Into the memory of the lot before this one, which has computed: the collective waits for what was begun.
            self._begin(number + 1)

    def _leave(self, number: int) -> None:
        self._lots[number].vacate()
        self._next = number + 1
        if self._next == len(self._lots):
            self._begun = 0
            self._ranks.midway = False

    def _begin(self, number: int) -> None:
        self._coming = self._lots[number].gather(self._half(number))
        self._begun = number + 1

    def _arrived(self) -> None:
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def _half(self, number: int) -> Tensor:
        assert self._memory is not None  # a pass outside of `open` and `close`
        return self._memory[number % 2]


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a model: of all its lists of modules, those that hold the most weights.

    Raises:
        ModelError: It has no list of layers.
    """

    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(module).__name__} has no list of layers: it can only be gathered whole")
    sizes = [sum(weight.numel() for weight in each.parameters()) for each in lists]
    return list(lists[sizes.index(max(sizes))])
