"""Command-line options that the benchmarks share, and their interpretation."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks.environment import slug

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Shape = Annotated[
    list[str] | None,
    typer.Option(
        help="Change the workload: prompts=16, K=4, M=2, meta_prompt=…, prompt=…, rewrite=…, template=…, response=… "
        "in tokens, prompter=LAYERSxHIDDEN, target=…; may be repeated.",
        show_default=False,
    ),
]
"""Changes of a workload of chains; see `benchmarks.workload.reshape`."""
Entrants = Annotated[
    list[str] | None,
    typer.Option(help="Names or patterns, such as 'ours*'; may be repeated. Default: all.", show_default=False),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if available.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: bfloat16 on a GPU, otherwise float32.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of torch's CPU threads.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="Smoke test: a tiny case and few rounds; the figures are not valid.")
]


class Named(Protocol):
    """Anything that is selected by name."""

    @property
    def name(self) -> str:
        """Its name."""


NamedT = TypeVar("NamedT", bound=Named)


def new_app() -> typer.Typer:
    """Create a command line that reports errors as a single message."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def use_threads(threads: int | None) -> None:
    """Set the number of torch's threads, if given."""
    if threads is not None:
        torch.set_num_threads(threads)


def find_device(name: str) -> torch.device:
    """Return the device of an option."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of an option.

    Raises:
        typer.BadParameter: There is no dtype of that name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise typer.BadParameter(f"dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def matching(everything: Sequence[NamedT], patterns: Sequence[str] | None, kind: str) -> list[NamedT]:
    """Return the items whose name matches a pattern, in their original order; all of them without patterns.

    Raises:
        typer.BadParameter: A pattern matches nothing.
    """
    names = [one.name for one in everything]
    for pattern in patterns or []:
        if not fnmatch.filter(names, pattern):
            raise typer.BadParameter(f"{kind} {pattern!r}: use names or patterns of {', '.join(names)}")
    return [
        one for one in everything if not patterns or any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)
    ]


def results_folder(benchmark: str, device: torch.device, *, quick: bool) -> Path:
    """Return the default folder for results: one per device, and a separate one for smoke tests."""
    return Path(f"runs/{benchmark}-quick") if quick else Path(__file__).parent / "results" / slug(device)


def new_console(width: int) -> Console:
    """Create the console for tables, with a fixed width if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
