"""python -m benchmarks.kernels: the head's operators compared with bare matrix products and other implementations.

Prints one table per case for each shape and writes ``kernels.json`` and ``kernels.png``.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import environment, options
from benchmarks.kernels import figure, ours, peers, plain
from benchmarks.kernels.cases import CASES, Case
from benchmarks.kernels.compare import Limits, compare
from benchmarks.kernels.entrant import Entrant, Setting
from benchmarks.kernels.problem import make_heads
from benchmarks.kernels.shapes import QUICK, SHAPES, Shape, default_rows, parse_shape
from benchmarks.kernels.table import WIDTH, print_table

QUICK_ROWS = 32
CPU_LIMITS, GPU_LIMITS = Limits(rounds=3, seconds=60), Limits(rounds=20, seconds=8)

app = options.new_app()


@app.command(help=__doc__)
def run(
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(s.name for s in SHAPES)}, all, DxV or DxV:SOFTCAP; may be repeated. "
            "Default: all on a GPU, otherwise the first.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Tokens N; may be repeated. Default: depends on device and shape.", show_default=False
        ),
    ] = None,
    entrants: options.Entrants = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Names or patterns, such as 'policy*'; may be repeated. Default: all.", show_default=False),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Entrants to leave out, names or patterns; may be repeated.", show_default=False),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum rounds per case. Default: 3 on a CPU, 20 on a GPU.", show_default=False),
    ] = None,
    case_seconds: Annotated[
        float | None,
        typer.Option(
            help="Time limit per case, checked after the third round. Default: 60 on a CPU, 8 on a GPU.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Results folder. Default: benchmarks/results/DEVICE.", show_default=False)
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Keep existing results for other shapes, N, dtypes and cases.")
    ] = False,
    quick: options.Quick = False,
) -> None:
    """See the module."""
    options.use_threads(threads)
    where = options.find_device(device)
    what = options.find_dtype(dtype, where)
    shapes = _shapes(shape, where, quick)
    chosen_cases = options.matching(CASES, cases, "case")
    chosen = options.matching([*ours.entrants(), *plain.entrants(), *peers.entrants()], entrants, "entrant")
    left_out = options.matching(chosen, without, "entrant") if without else []
    chosen = [entrant for entrant in chosen if entrant not in left_out]
    default = CPU_LIMITS if where.type == "cpu" else GPU_LIMITS
    limits = Limits(rounds or (2 if quick else default.rounds), case_seconds or default.seconds)
    folder = out or options.results_folder("kernels", where, quick=quick)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "kernels.json"

    document = json.loads(file.read_text()) if append and file.exists() else {"runs": [], "results": []}
    document["runs"].append(
        environment.describe("benchmarks.kernels", where, what, environment.command_line())
        | {"seed": seed, "limits": vars(limits)}
    )
    console = options.new_console(WIDTH)
    console.print(f"{environment.device_name(where)}, {what}, {torch.get_num_threads()} CPU threads", highlight=False)
    with _imports_frozen():
        for one in shapes:
            setting = Setting(where, what, one)
            sizes = rows or ([QUICK_ROWS] if quick else default_rows(one, where.type))
            _warn_of_cache(console, setting)
            new = _measure(console, setting, chosen_cases, chosen, sizes, seed, limits, document, file)
            print_table(console, new, str(what).removeprefix("torch."))
    figure.draw(document, folder / "kernels.png")
    console.print(f"{file}\n{folder / 'kernels.png'}", highlight=False)


def _measure(
    console: Console,
    setting: Setting,
    cases: Sequence[Case],
    entrants: Sequence[Entrant],
    sizes: Sequence[int],
    seed: int,
    limits: Limits,
    document: dict[str, Any],
    file: Path,
) -> list[dict[str, Any]]:
    """Measure one shape. The file is written after every case, so that an aborted run keeps its results."""
    reference = any(case.kl == "separate" for case in cases)
    heads = make_heads(setting.shape, setting.device, setting.dtype, seed, reference=reference)
    new: list[dict[str, Any]] = []
    for case in cases:
        for size in [sizes[0]] if case.batch else sizes:
            with console.status(f"{setting.shape.name}: {case.title}, N {case.batch or size}"):
                result = compare(case, entrants, setting, heads, size, seed + 1, limits)
            result["run"] = len(document["runs"]) - 1
            new.append(result)
            document["results"] = [r for r in document["results"] if _key(r) != _key(result)] + [result]
            file.write_text(json.dumps(document, indent=1) + "\n")
    return new


@contextlib.contextmanager
def _imports_frozen() -> Iterator[None]:
    """Exclude objects created by imports from garbage collection, which runs before each measurement."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return (result["shape"]["name"], result["rows"], result["dtype"], result["case"]["name"])


def _shapes(names: list[str] | None, device: torch.device, quick: bool) -> list[Shape]:
    if not names:
        return [QUICK] if quick else list(SHAPES[:1] if device.type == "cpu" else SHAPES)
    try:
        return [shape for name in names for shape in parse_shape(name)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _warn_of_cache(console: Console, setting: Setting) -> None:
    """Warn if the head, the largest input, may stay in the cache between calls, unlike in training."""
    if setting.device.type != "cuda":
        return
    size = setting.shape.hidden * setting.shape.vocabulary * setting.dtype.itemsize
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    if size < 2 * cache:
        console.print(
            f"{setting.shape.name}: the head ({size >> 20} MiB) is not much larger than the cache", highlight=False
        )


if __name__ == "__main__":
    app()
