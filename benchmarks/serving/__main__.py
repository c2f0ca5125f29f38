"""python -m benchmarks.serving: what the proxy adds to a chat, its memory under many streams and disconnects, and overload.

Client, proxy and target are processes of their own on this machine; nothing is rewritten. Chats are sent direct and through the
proxy in turn.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from benchmarks import command
from benchmarks.serving.measure import disconnects, overhead, overload, streams
from benchmarks.session import Session
from benchmarks.table import print_table

app = command.new_app()


@app.command(help=__doc__)
def run(
    concurrency: Annotated[int, typer.Option(min=1, help="Chats at the same time.")] = 50,
    latency: Annotated[float, typer.Option(min=0.001, help="Seconds after which the target answers.")] = 0.3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each round.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of direct chats and of chats through the proxy.")] = 3,
    held: Annotated[int, typer.Option(min=1, help="Streams at the same time.")] = 1000,
    left: Annotated[int, typer.Option(min=1, help="Chats whose client disconnects.")] = 10_000,
    at_once: Annotated[int, typer.Option(min=10, help="Chats at once, for a tenth of which there are places.")] = 1000,
    quick: command.Quick = False,
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("serving", device="cpu", threads=1, quick=quick, file=json_file)
    if quick:
        concurrency, latency, seconds, rounds, held, left, at_once = 4, 0.02, 0.2, 1, 8, 40, 40
    document: dict[str, Any] = {"run": session.describe()}
    document["overhead"] = overhead(concurrency, latency, seconds, rounds)
    session.save(document)
    document["streams"] = streams(held, 0.01 if quick else 0.5)
    session.save(document)
    document["disconnects"] = disconnects(left, 4 if quick else 50, 0.02)
    session.save(document)
    document["overload"] = overload(at_once, at_once // 10, at_once // 10, latency)
    session.save(document)
    _print_overhead(session, document["overhead"])
    for name in ("streams", "disconnects", "overload"):
        session.print(f"{name}: {document[name]}")
    session.finish()


def _print_overhead(session: Session, row: dict[str, Any]) -> None:
    heads = ["way", "chats", "p50 ms", "p90 ms", "p99 ms", "client CPU ms", "target CPU ms", "proxy CPU ms"]
    rows = []
    for way in ("direct", "proxy"):
        spent = row[way]["cpu_ms_per_chat"]
        figures = [row[way][f"p{share}_ms"] for share in (50, 90, 99)] + [
            spent[one] for one in ("client", "target", "proxy")
        ]
        rows.append([way, str(row[way]["chats"]), *(format(figure, ".2f") for figure in figures)])
    print_table(session.console, heads, rows, title=f"{row['concurrency']} chats at the same time")
    added = ", ".join(f"{name.removesuffix('_ms')} {value:.2f} ms" for name, value in row["overhead"].items())
    session.print(f"overhead over the direct median: {added}")


if __name__ == "__main__":
    app()
