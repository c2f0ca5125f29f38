"""How long the cells of an experiment that are left will take, from those that are done."""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.experiments.cell_record import read_record
from alignpro.experiments.cells import Cell
from alignpro.training.progress import show_duration


def describe_time_left(all_cells: Sequence[Cell], left: Sequence[Cell]) -> str:
    """The time left as text, such as ``3 h 20 min left``.

    A cell takes as long as the mean of the cells of its method that are done; as long as no cell of a method is done, its
    cells are counted as nothing, and the text says so.

    Args:
        all_cells: The experiment's.
        left: Those of them that are still to be done.
    """
    seconds: dict[str, list[float]] = {}
    for cell in all_cells:
        record = read_record(cell.directory)
        if cell.done and record is not None and record.state == "done":
            seconds.setdefault(cell.kind, []).append(record.seconds)
    known = sum(sum(seconds[cell.kind]) / len(seconds[cell.kind]) for cell in left if cell.kind in seconds)
    unknown = sorted({cell.kind for cell in left} - seconds.keys())
    if not unknown:
        return f"{show_duration(known)} left"
    untimed = f"the time of {', '.join(unknown)} is not known yet"
    return f"more than {show_duration(known)} left: {untimed}" if known else untimed
