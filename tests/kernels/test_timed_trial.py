"""A timed trial takes the fastest implementation that works and agrees with the one that always runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alignpro_kernels.timed_trial import MARGIN, Choice, choose


class Device:
    """A fake device: implementations take the seconds that they are said to take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting = 0.0

    def trial(self, seconds: list[float] | float, value: float = 1.0) -> Callable[[], tuple[Tensor]]:
        times = [seconds] if isinstance(seconds, float) else list(seconds)

        def run() -> tuple[Tensor]:
            self.waiting += times.pop(0) if len(times) > 1 else times[0]
            return (torch.full((3,), value),)

        return run

    def synchronize(self) -> None:
        self.now, self.waiting = self.now + self.waiting, 0.0

    def choose(self, **trials: Callable[[], tuple[Tensor]]) -> Choice:
        return choose(trials, synchronize=self.synchronize, clock=lambda: self.now)


def failing(error: Exception) -> Callable[[], tuple[Tensor]]:
    def run() -> tuple[Tensor]:
        raise error

    return run


def test_the_fastest_is_chosen_and_every_time_is_said() -> None:
    device = Device()
    choice = choose(
        {"triton": device.trial(0.003), "two": device.trial(0.002), "three": device.trial(0.001)},
        synchronize=device.synchronize,
        clock=lambda: device.now,
    )
    assert choice.name == "three"
    assert choice.seconds == pytest.approx({"triton": 0.003, "two": 0.002, "three": 0.001})
    assert str(choice) == "three (three 1.000 ms; two 2.000 ms; triton 3.000 ms)"


def test_another_must_be_faster_by_more_than_noise() -> None:
    for seconds, expected in ((1.0, "base"), (1.001 / MARGIN, "base"), (0.999 / MARGIN, "other"), (1.5, "base")):
        device = Device()
        choice = device.choose(base=device.trial(1.0), other=device.trial(seconds))
        assert choice.name == expected


def test_compilation_and_outliers_do_not_count() -> None:
    device = Device()
    slow_first = device.trial([60.0, 5.0, 5.0, 9.0, 1.0, 7.0, 1.2])
    choice = device.choose(base=device.trial(2.0), other=slow_first)
    assert choice.name == "other"


def test_what_fails_or_disagrees_is_not_used_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    with caplog.at_level("WARNING", "alignpro_kernels"):
        choice = choose(
            {
                "base": device.trial(1.0),
                "missing": failing(TypeError("got an unexpected\nkeyword argument 'causal'")),
                "wrong": device.trial(0.1, value=1.1),
                "nan": device.trial(0.1, value=float("nan")),
                "rounded": device.trial(0.5, value=1.01),
            },
            synchronize=device.synchronize,
            clock=lambda: device.now,
        )
    assert choice.name == "rounded" and set(choice.reasons) == {"missing", "wrong", "nan"}
    assert choice.reasons["missing"] == "TypeError: got an unexpected keyword argument 'causal'"
    assert choice.reasons["wrong"] == "its result 0 differs by 0.1, and at most 0.0312 would be rounding"
    assert [message.split(":")[0] for message in caplog.messages] == [
        f"{name} is not used" for name in ("missing", "wrong", "nan")
    ]
    assert "missing cannot run: TypeError" in str(choice)


def test_the_one_that_always_runs_must_run() -> None:
    device = Device()
    with pytest.raises(RuntimeError, match="broken"):
        choose({"base": failing(RuntimeError("broken")), "other": device.trial(1.0)})
    with pytest.raises(torch.AcceleratorError):
        choose({"base": device.trial(1.0), "other": failing(torch.AcceleratorError("illegal memory access"))})
