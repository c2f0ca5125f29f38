"""Tensor memory on a device, and its peak in each phase of a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from alignpro.distributed.ranks import Ranks
from alignpro.engine.virtual_memory import peak_mapped_bytes


class DeviceGauge:
    """Measures with the accelerator's allocator, and the memory that the engine maps without it.

    Args:
        device: The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self) -> int:
        """Return the peak number of bytes since the last call: the sum of the peaks of both."""
        peak = int(torch.accelerator.max_memory_allocated(self._device))
        torch.accelerator.reset_peak_memory_stats(self._device)
        return peak + peak_mapped_bytes(self._device)


class StorageGauge(TorchDispatchMode):
    """Measures by tracking every live storage on the CPU, whose allocator keeps no statistics.

    Temporary memory inside an operator is not seen. Storages are counted at their full size, even if the system has not
    yet allocated pages for them, as on an accelerator.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, weakref.ref[Any]] = {}
        self._bytes = self._peak = 0

    def count_existing(self) -> None:
        """Count tensors created before the mode was active, or by other threads."""
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
                self._count(thing)
        self._peak = self._bytes

    def peak(self) -> int:
        """Return the peak number of bytes since the last call."""
        peak, self._peak = self._peak, self._bytes
        return peak

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        owner: Any = tensor.untyped_storage()
        size = owner.nbytes()
        if size and id(owner) not in self._live:
            self._live[id(owner)] = weakref.ref(owner, partial(self._forget, id(owner), size))
            self._bytes += size
            self._peak = max(self._peak, self._bytes)

    def _forget(self, identity: int, size: int, _: weakref.ref[Any]) -> None:
        del self._live[identity]
        self._bytes -= size


class PhasePeaks:
    """Records the peak number of bytes in each phase of a step.

    Args:
        gauge: Measures the memory.
        ranks: Announces the start of each phase.
    """

    def __init__(self, gauge: DeviceGauge | StorageGauge, ranks: Ranks) -> None:
        self._gauge, self._ranks = gauge, ranks
        self._phase: str | None = None
        self.bytes: dict[str, int] = {}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Record one step."""
        told = self._ranks.on_phase

        def begin(doing: str) -> None:
            self._end()
            self._phase = doing.rpartition(", ")[2]
            if told is not None:
                told(doing)

        self._ranks.on_phase = begin
        self._gauge.peak()
        try:
            yield
        finally:
            self._end()
            self._ranks.on_phase = told

    def _end(self) -> None:
        peak = self._gauge.peak()
        if self._phase is not None:
            self.bytes[self._phase] = max(peak, self.bytes.get(self._phase, 0))
        self._phase = None
