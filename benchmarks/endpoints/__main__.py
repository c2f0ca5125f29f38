"""python -m benchmarks.endpoints: answers a second that the client takes on one core, its memory, the time of rollouts and steps.

The server is a process of its own on this machine that gives the same answer every time. Speed and memory are measured without a
ledger and with one, in which every request and answer is on disk before it is used; rollouts without; training steps of the
demo's prompter with one: once with `rollout.ahead` and once without it, and with a judge that is asked about each answer as soon
as it is there, or about all of them after the rollout. Parts that are left out keep the results that the file has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from benchmarks import command
from benchmarks.endpoints.measure import rollout, throughput
from benchmarks.endpoints.steps import step_seconds
from benchmarks.session import Session
from benchmarks.table import print_table

PARTS = ("throughput", "rollouts", "steps", "judged_steps")

app = command.new_app()


@app.command(help=__doc__)
def run(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; may be repeated.")] = None,
    answers: Annotated[int, typer.Option(min=10, help="Answers of the measurement of speed and memory.")] = 100_000,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at the same time.")] = 64,
    latency: Annotated[float, typer.Option(min=0, help="Seconds of an answer in a rollout.")] = 0.3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each kind.")] = 12,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    if unknown := sorted(set(only or ()) - set(PARTS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(PARTS)}", param_hint="--only")
    session = Session("endpoints", device="cpu", threads=1, quick=quick, file=json_file)
    document: dict[str, Any] = json.loads(session.file.read_text()) if only and session.file.is_file() else {}
    document["run"] = session.describe()
    few, scale = max(concurrency // 4, 1), 0.05 if quick else 1.0
    latency, steps = scale * latency, 2 if quick else steps
    cases: dict[str, list[tuple[Any, ...]]] = {
        "throughput": [(200 if quick else answers, concurrency, recorded) for recorded in (False, True)],
        "rollouts": [
            (latency, 64, limit, scale * prompter_seconds, 1 if quick else 7)
            for limit, prompter_seconds in ((concurrency, 0.0), (concurrency, 1.2), (few, 0.6))
        ],
        "steps": [(latency, limit, steps, ahead) for limit in (concurrency, few) for ahead in (0, 1)],
        "judged_steps": [(latency, few, steps, 0, judged) for judged in ("afterwards", "early")],
    }
    measure: dict[str, Callable[..., dict[str, Any]]] = {
        "throughput": throughput,
        "rollouts": rollout,
        "steps": step_seconds,
        "judged_steps": step_seconds,
    }
    for part in only or PARTS:
        document[part] = []
        document.setdefault("parts", {})[part] = session.describe() | {"scheduler": _scheduler()}
        for case in cases[part]:
            document[part].append(measure[part](*case))
            session.save(document)
        _show(session, part, document[part])
    session.finish()


def _show(session: Session, part: str, rows: Sequence[dict[str, Any]]) -> None:
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    cells = [[each if isinstance(each := row[key], str) else format(each, ",.4g") for key in keys] for row in rows]
    print_table(session.console, keys, cells, left=0, title=part)


def _scheduler() -> str:
    """How the operating system treats this process: what else runs takes little from a real-time one."""
    names = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_FIFO: "SCHED_FIFO", os.SCHED_RR: "SCHED_RR"}
    kind = os.sched_getscheduler(0)
    return f"{names.get(kind, kind)} {os.sched_getparam(0).sched_priority}"


if __name__ == "__main__":
    app()
