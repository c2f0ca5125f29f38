"""python -m benchmarks.endpoints: answers a second that the client takes on one core, its memory, the time of rollouts and steps.

The server is a process of its own on this machine that gives the same answer every time. Speed and memory are measured without a
ledger and with one, in which every request and answer is on disk before it is used; rollouts without; training steps of the
demo's prompter with one, once with `rollout.ahead` and once without it.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from benchmarks import command
from benchmarks.endpoints.measure import rollout, throughput
from benchmarks.endpoints.steps import step_seconds
from benchmarks.session import Session
from benchmarks.table import print_table

app = command.new_app()


@app.command(help=__doc__)
def run(
    answers: Annotated[int, typer.Option(min=10, help="Answers of the measurement of speed and memory.")] = 100_000,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at the same time.")] = 64,
    latency: Annotated[float, typer.Option(min=0, help="Seconds of an answer in a rollout.")] = 0.3,
    steps: Annotated[int, typer.Option(min=0, help="Training steps of each kind; 0 leaves them out.")] = 12,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("endpoints", device="cpu", threads=1, quick=quick, file=json_file)
    document: dict[str, Any] = {"run": session.describe(), "throughput": [], "rollouts": [], "steps": []}
    for recorded in (False, True):
        document["throughput"].append(throughput(200 if quick else answers, concurrency, recorded))
        session.save(document)
    heads = ["ledger", "answers", "at once", "answers/s", "answers/CPU s", "CPU µs each", "MiB", "MiB more"]
    cells = [
        ["yes" if speed["ledger"] else "no", *(format(value, ",.0f") for value in list(speed.values())[1:])]
        for speed in document["throughput"]
    ]
    print_table(session.console, heads, cells, title="client")
    scale = 0.05 if quick else 1.0
    for limit, prompter_seconds in ((concurrency, 0.0), (concurrency, 1.2), (max(concurrency // 4, 1), 0.6)):
        document["rollouts"].append(
            rollout(scale * latency, 64, limit, scale * prompter_seconds, rounds=1 if quick else 7)
        )
        session.save(document)
    keys = ["latency", "chains", "concurrency", "prompter_s", "endpoint_s", "median_s", "least_s", "goal_s"]
    rows = [[format(row[key], ",.3g") for key in keys] for row in document["rollouts"]]
    print_table(session.console, keys, rows, left=0, title="rollouts")
    for limit in (concurrency, max(concurrency // 4, 1)) if steps else ():
        for ahead in (0, 1):
            document["steps"].append(step_seconds(scale * latency, limit, ahead, 2 if quick else steps))
            session.save(document)
    if steps:
        keys = list(document["steps"][0])
        rows = [[format(row[key], ",.3g") for key in keys] for row in document["steps"]]
        print_table(session.console, keys, rows, left=0, title="training steps")
    session.finish()


if __name__ == "__main__":
    app()
