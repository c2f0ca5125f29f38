"""python -m benchmarks.kernels: the head's operators compared with bare matrix products and other implementations.

Prints one table per case for each shape and writes ``kernels.json`` and ``kernels.png``.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import command
from benchmarks.kernels import figure, ours, peers, plain
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.compare import Limits, compare
from benchmarks.kernels.entrant import Setting
from benchmarks.kernels.problem import make_heads
from benchmarks.kernels.shapes import QUICK, SHAPES, Shape, default_rows, parse_shape
from benchmarks.kernels.table import print_shape
from benchmarks.session import Session

QUICK_ROWS = 32
CPU_LIMITS, GPU_LIMITS = Limits(rounds=3, seconds=60), Limits(rounds=20, seconds=8)

app = command.new_app()


@app.command(help=__doc__)
def run(
    device: command.Device = "auto",
    dtype: command.Dtype = "auto",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(s.name for s in SHAPES)}, all, DxV or DxV:SOFTCAP; may be repeated. "
            "Default: all on a GPU, otherwise the first."
        ),
    ] = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens N; may be repeated. Default: depends on device and shape.")
    ] = None,
    entrants: command.Entrants = None,
    cases: Annotated[
        list[str] | None, typer.Option(help="Names or patterns, such as 'policy*'; may be repeated. Default: all.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Entrants to leave out, names or patterns; may be repeated.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Maximum rounds per case. Default: 3 on a CPU, 20 on a GPU.")
    ] = None,
    case_seconds: Annotated[
        float | None,
        typer.Option(help="Time limit per case, checked after the third round. Default: 60 on a CPU, 8 on a GPU."),
    ] = None,
    threads: command.Threads = None,
    seed: command.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Results folder. Default: benchmarks/results/DEVICE.")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Keep existing results for other shapes, N, dtypes and cases.")
    ] = False,
    quick: command.Quick = False,
) -> None:
    """See the module."""
    file = out / "kernels.json" if out else None
    session = Session("kernels", device=device, dtype=dtype, threads=threads, quick=quick, file=file)
    shapes = _shapes(shape, session.device, quick)
    chosen_cases = command.matching(CASES, cases, "case")
    chosen = command.matching([*ours.entrants(), *plain.entrants(), *peers.entrants()], entrants, "entrant")
    left_out = command.matching(chosen, without, "entrant") if without else []
    chosen = [entrant for entrant in chosen if entrant not in left_out]
    default = CPU_LIMITS if session.device.type == "cpu" else GPU_LIMITS
    limits = Limits(rounds or (2 if quick else default.rounds), case_seconds or default.seconds)
    reference = any(case.kl == "separate" for case in chosen_cases)

    document: dict[str, Any] = {"runs": [], "results": []}
    if append and session.file.exists():
        document = json.loads(session.file.read_text())
    document["runs"].append(session.describe(seed=seed, limits=vars(limits)))
    session.print_device()
    gc.freeze()  # garbage is collected before each measurement: leave out what the imports have created
    for one in shapes:
        setting = Setting(session.device, session.dtype, one)
        sizes = rows or ([QUICK_ROWS] if quick else default_rows(one, session.device.type))
        _warn_of_cache(session, one)
        heads = make_heads(one, session.device, session.dtype, seed, reference=reference)
        new: list[dict[str, Any]] = []
        for case in chosen_cases:
            for size in [case.batch] if case.batch else sizes:
                with session.console.status(f"{one.name}: {case.title}, N {size}"):
                    result = compare(case, chosen, setting, heads, size, seed + 1, limits)
                result["run"] = len(document["runs"]) - 1
                new.append(result)
                document["results"] = [r for r in document["results"] if _key(r) != _key(result)] + [result]
                session.save(document)
        print_shape(session.console, new)
    gc.unfreeze()
    figure.draw(document, session.figure)
    session.finish()


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return (result["shape"]["name"], result["rows"], result["dtype"], result["case"]["name"])


def _shapes(names: list[str] | None, device: torch.device, quick: bool) -> list[Shape]:
    if not names:
        return [QUICK] if quick else list(SHAPES[:1] if device.type == "cpu" else SHAPES)
    try:
        return [shape for name in names for shape in parse_shape(name)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _warn_of_cache(session: Session, shape: Shape) -> None:
    """Warn if the head, the largest input, may stay in the cache between calls, unlike in training."""
    if session.device.type != "cuda":
        return
    size = shape.hidden * shape.vocabulary * session.dtype.itemsize
    if size < 2 * torch.cuda.get_device_properties(session.device).L2_cache_size:
        session.print(f"{shape.name}: the head ({size >> 20} MiB) is not much larger than the cache")


if __name__ == "__main__":
    app()
