"""Timing of device work: by events on a GPU, by the host's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from benchmarks.device import synchronize

T = TypeVar("T")


class Seconds(NamedTuple):
    """Seconds per call in one measurement."""

    forward: float
    total: float


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, forward: Callable[[], T], backward: Callable[[T], object] | None = None, *, calls: int) -> Seconds:
        """Return the mean over ``calls`` consecutive calls, which on a GPU hides the launch overhead of all but the first.

        The result of a call is freed before the next one.
        """
        marks: list[float | torch.cuda.Event] = []
        synchronize(self._device)
        for _ in range(calls):
            marks.append(self._mark())
            result = forward()
            marks.append(self._mark())
            gradients = backward(result) if backward else None
            marks.append(self._mark())
            del result, gradients
        synchronize(self._device)
        spent = [
            Seconds(self._between(marks[i], marks[i + 1]), self._between(marks[i], marks[i + 2]))
            for i in range(0, len(marks), 3)
        ]
        return Seconds(sum(s.forward for s in spent) / calls, sum(s.total for s in spent) / calls)

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
        if isinstance(start, float):
            assert isinstance(stop, float)
            return stop - start
        assert not isinstance(stop, float)
        return float(start.elapsed_time(stop)) / 1e3
