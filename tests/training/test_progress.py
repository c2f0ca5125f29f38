"""Progress: a bar in a terminal or a notebook, and otherwise a line from time to time."""

from __future__ import annotations

import builtins
import logging
import sys
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from alignpro.training import progress
from alignpro.training.progress import progress_bar, show_pace


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    caplog.set_level(logging.INFO, logger="alignpro.training.progress")
    return caplog


def test_without_a_terminal_the_first_and_last_steps_have_a_line(lines: pytest.LogCaptureFixture) -> None:
    with progress_bar(100, 0, ("loss", "kl")) as advance:
        for step in range(100):
            advance({"loss": step / 8, "other": 1.0})
    first, last = lines.messages
    assert first.startswith("step 1/100  ")
    assert "left  loss 0" in first
    assert last.startswith("step 100/100  ")
    assert last.endswith("loss 12.38"), "the progress_metrics's metrics that exist"


def test_lines_come_at_intervals(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bar(20, 0, ()) as advance:
        for _ in range(20):
            advance({})
    assert [int(m.split("/")[0].removeprefix("step ")) for m in lines.messages] == [1, 5, 9, 13, 17, 20]
    assert lines.messages[-1].split("  ")[1] == "3.0 s/step"


def test_a_resumed_run_continues_the_count_and_measures_its_own_rate(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 2.0, 4.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bar(100, 98, ()) as advance:
        advance({})
        advance({})
    assert [message.strip() for message in lines.messages] == [
        "step 99/100  2.0 s/step, 2 s left",
        "step 100/100  2.0 s/step",
    ]


@pytest.mark.parametrize(
    ("steps", "seconds", "left", "shown"),
    [
        (2, 34.0, 32, "17 s/step, 9 min left"),
        (1, 1.0, 59, "1.0 s/step, 59 s left"),
        (1, 1.0, 60, "1.0 s/step, 1 min left"),
        (1, 9.96, 1, "10 s/step, 10 s left"),
        (1, 150.0, 80, "150 s/step, 3 h 20 min left"),
        (1, 30.0, 119, "30 s/step, 1 h 0 min left"),
        (1, 3600.0, 53, "3600 s/step, 2 d 5 h left"),
        (5, 2.0, 100, "2.5 steps/s, 40 s left"),
        (100, 1.0, 10, "100 steps/s, 0 s left"),
        (3, 51.0, 0, "17 s/step"),
        (1, 0.0, 0, "1000000000 steps/s"),
    ],
)
def test_slow_steps_are_shown_as_seconds_a_step_and_time_left(
    steps: int, seconds: float, left: int, shown: str
) -> None:
    assert show_pace(steps, seconds, left) == shown


def test_steps_may_have_another_name_and_come_several_at_once(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 2.0, 2.0, 6.0, 6.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bar(12, 0, (), unit="response") as advance:
        advance({}, (), 4)
        advance({}, (), 8)
    assert lines.messages[0].strip() == "response 4/12  2.0 responses/s, 4 s left"
    assert lines.messages[-1].startswith("response 12/12  ")


def test_the_bar_shows_the_pace_of_the_log_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    clock = iter((0.0, 17.0, 34.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress_bar(34, 0, ()) as advance:
        advance({})
        advance({})
    assert "17 s/step, 9 min left" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(10, 4, ("loss",)) as advance:
        for _ in range(6):
            advance({"loss": 0.5})
    shown = capsys.readouterr()
    assert "10/10" in shown.err
    assert "loss 0.5" in shown.err
    assert shown.out == ""


def test_a_notebook_gets_a_bar_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython is not installed with the tests: its `display` is played by one that keeps what a browser would show."""
    shown: list[str] = []

    class Handle:
        def update(self, bar: Progress) -> None:
            shown.append(bar._repr_mimebundle_((), ())["text/html"])

    def display(bar: Progress, display_id: bool) -> Handle:
        assert display_id
        Handle().update(bar)
        return Handle()

    monkeypatch.setattr(builtins, "get_ipython", type("ZMQInteractiveShell", (), {}), raising=False)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 0.0)
    with progress_bar(10, 4, ("loss",)) as advance:
        for step in range(6):
            advance({"loss": step / 2})
    assert len(shown) == 8
    assert "4/10" in shown[0]
    assert "5/10" in shown[1] and "loss 0" in shown[1]
    assert "10/10" in shown[-1] and "loss 2.5" in shown[-1]


def test_what_is_zero_but_for_rounding_is_shown_as_zero(lines: pytest.LogCaptureFixture) -> None:
    with progress_bar(1, 0, ("kl", "loss")) as advance:
        advance({"kl": -2.7e-08, "loss": 2.7e-05})
    assert lines.messages[0].endswith("kl 0  loss 2.7e-05")
