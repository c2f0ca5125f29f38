"""Progress display: a bar with rates on a terminal or in a notebook, or plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Advance = Callable[[Mapping[str, float]], None]
_SECONDS_BETWEEN_LINES = 10.0
_ROUNDING = 1e-6
"""Of a sum of float32 terms of order one."""
_SECONDS_BETWEEN_UPDATES = 0.25
"""Of a bar in a notebook, where each update is a message to the browser."""


@contextmanager
def progress_bar(
    total: int, completed: int, progress_metrics: Sequence[str], *, shown: bool = True
) -> Iterator[Advance]:
    """Show a progress bar over steps; call the yielded function with the metrics of each step.

    Args:
        total: Number of steps.
        completed: Number of steps completed before.
        progress_metrics: Names of the metrics to show.
        shown: Whether this process shows the bar.
    """
    if not shown:
        yield lambda metrics: None
        return
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _line_writer(total, completed, progress_metrics)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task("", total=total, completed=completed, rate="", shown="")

    def advance(metrics: Mapping[str, float]) -> None:
        speed = bar.tasks[0].speed
        rate = f"{speed:.2f} steps/s" if speed else ""
        bar.update(task, advance=1, rate=rate, shown=_show(metrics, progress_metrics))

    if not console.is_jupyter:
        with bar:
            yield advance
        return
    # rich's own live display needs ipywidgets; this one needs only IPython, which is there because the notebook is.
    from IPython.display import display

    handle, updated = display(bar, display_id=True), time.monotonic()

    def advance_and_show(metrics: Mapping[str, float]) -> None:
        nonlocal updated
        advance(metrics)
        if time.monotonic() - updated >= _SECONDS_BETWEEN_UPDATES:
            handle.update(bar)
            updated = time.monotonic()

    try:
        yield advance_and_show
    finally:
        handle.update(bar)


def _line_writer(total: int, completed: int, progress_metrics: Sequence[str]) -> Advance:
    """Log a line at most every `_SECONDS_BETWEEN_LINES`, and at the last step."""
    done, started, last_line = completed, time.monotonic(), -_SECONDS_BETWEEN_LINES

    def advance(metrics: Mapping[str, float]) -> None:
        nonlocal done, last_line
        done += 1
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES or done == total:
            rate = (done - completed) / max(now - started, 1e-9)  # of this process, without the steps before
            shown = [f"step {done}/{total}", f"{rate:.2f} steps/s", _show(metrics, progress_metrics)]
            if done < total:
                shown.append(f"{timedelta(seconds=round((total - done) / rate))} left")
            logger.info("%s", "  ".join(part for part in shown if part))
            last_line = now

    return advance


def _show(metrics: Mapping[str, float], progress_metrics: Sequence[str]) -> str:
    """Format the metrics; what is 0 but for rounding, such as the KL before the first update, is shown as 0."""
    shown = {name: metrics[name] for name in progress_metrics if name in metrics}
    return "  ".join(f"{name} {0.0 if abs(value) < _ROUNDING else value:.4g}" for name, value in shown.items())
