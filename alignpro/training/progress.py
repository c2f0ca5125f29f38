"""Progress display: a bar with the pace and the time left on a terminal or in a notebook, or plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)


class Advance(Protocol):
    """Shows that another step has been made, or several."""

    def __call__(self, metrics: Mapping[str, float], notes: Sequence[str] = (), steps: int = 1, /) -> None:
        """Show the metrics of the last step, and what is worth noting, in a few words."""


_SECONDS_BETWEEN_LINES = 10.0
_ROUNDING = 1e-6
"""Of a sum of float32 terms of order one."""
_SECONDS_BETWEEN_UPDATES = 0.25
"""Of a bar in a notebook, where each update is a message to the browser."""


def show_pace(steps: int, seconds: float, left: int, unit: str = "step") -> str:
    """Format how fast steps are made, and how long the others will take.

    Steps of a second or more are shown as ``17 s/step, 9 min left``, shorter ones as ``2.5 steps/s, 40 s left``.

    Args:
        steps: Number of steps that this process has made, at least 1.
        seconds: The time that these took.
        left: Number of steps that are left; without any, no time is shown.
        unit: What a step is called.
    """
    each = max(seconds, 1e-9) / steps
    pace = f"{_two_digits(each)} s/{unit}" if each >= 1 else f"{_two_digits(1 / each)} {unit}s/s"
    return f"{pace}, {show_duration(each * left)} left" if left else pace


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def show_duration(seconds: float) -> str:
    """Format a duration in the units that are worth reading: 40 s, 9 min, 3 h 20 min, 2 d 5 h."""
    if (rounded := round(seconds)) < 60:
        return f"{rounded} s"
    if (minutes := round(seconds / 60)) < 60:
        return f"{minutes} min"
    if (hours := round(seconds / 3600)) >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress_bar(
    total: int, completed: int, progress_metrics: Sequence[str], *, unit: str = "step", shown: bool = True
) -> Iterator[Advance]:
    """Show a progress bar over steps; call the yielded function with the metrics of each step.

    Args:
        total: Number of steps.
        completed: Number of steps completed before.
        progress_metrics: Names of the metrics to show.
        unit: What a step is called.
        shown: Whether this process shows the bar.
    """
    if not shown:
        yield lambda metrics, notes=(), steps=1: None
        return
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _line_writer(total, completed, progress_metrics, unit)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[pace]}"),
        TextColumn("{task.fields[shown]}"),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task("", total=total, completed=completed, pace="", shown="")
    started = time.monotonic()

    def advance(metrics: Mapping[str, float], notes: Sequence[str] = (), steps: int = 1, /) -> None:
        done = int(bar.tasks[0].completed) + steps
        pace = show_pace(done - completed, time.monotonic() - started, total - done, unit)
        bar.update(task, advance=steps, pace=pace, shown=_show(metrics, progress_metrics, notes))

    if not console.is_jupyter:
        with bar:
            yield advance
        return
    # rich's own live display needs ipywidgets; this one needs only IPython, which is there because the notebook is.
    from IPython.display import display

    handle, updated = display(bar, display_id=True), time.monotonic()

    def advance_and_show(metrics: Mapping[str, float], notes: Sequence[str] = (), steps: int = 1, /) -> None:
        nonlocal updated
        advance(metrics, notes, steps)
        if time.monotonic() - updated >= _SECONDS_BETWEEN_UPDATES:
            handle.update(bar)
            updated = time.monotonic()

    try:
        yield advance_and_show
    finally:
        handle.update(bar)


def _line_writer(total: int, completed: int, progress_metrics: Sequence[str], unit: str) -> Advance:
    """Log a line at most every `_SECONDS_BETWEEN_LINES`, and at the last step."""
    done, started, last_line = completed, time.monotonic(), -_SECONDS_BETWEEN_LINES

    def advance(metrics: Mapping[str, float], notes: Sequence[str] = (), steps: int = 1, /) -> None:
        nonlocal done, last_line
        done += steps
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES or done == total:
            pace = show_pace(done - completed, now - started, total - done, unit)
            shown = [f"{unit} {done}/{total}", pace, _show(metrics, progress_metrics, notes)]
            logger.info("%s", "  ".join(part for part in shown if part))
            last_line = now

    return advance


def _show(metrics: Mapping[str, float], progress_metrics: Sequence[str], notes: Sequence[str] = ()) -> str:
    """Format the metrics and notes; what is 0 but for rounding, such as the KL before the first update, is shown as 0."""
    shown = {name: metrics[name] for name in progress_metrics if name in metrics}
    values = [f"{name} {0.0 if abs(value) < _ROUNDING else value:.4g}" for name, value in shown.items()]
    return "  ".join([*values, *notes])
