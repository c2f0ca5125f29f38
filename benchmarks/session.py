"""One run of a benchmark: the device and dtype, the terminal, and the file of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import environment
from benchmarks.device import device_name, find_device, find_dtype, folder_name

WIDTH = 160
"""Width of the output if it is not a terminal."""


class Session:
    """Where a benchmark runs, and where its results go.

    Args:
        benchmark: The name of the benchmark, a module or package of `benchmarks`.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: A dtype or its name, or ``auto``.
        threads: Number of torch's CPU threads; None leaves it as it is.
        quick: Whether this is a smoke test; its results go to a folder of their own by default.
        file: The results file; by default one in the folder of the device.
        name: The default file's name without suffix; by default that of the benchmark.

    Raises:
        typer.BadParameter: There is no such device or dtype.
    """

    def __init__(
        self,
        benchmark: str,
        *,
        device: str,
        dtype: str | torch.dtype = "float32",
        threads: int | None = None,
        quick: bool = False,
        file: Path | None = None,
        name: str | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.benchmark = benchmark
        self.device = find_device(device)
        self.dtype = dtype if isinstance(dtype, torch.dtype) else find_dtype(dtype, self.device)
        results = Path(__file__).parent / "results" / folder_name(self.device)
        folder = Path(f"runs/{benchmark}-quick") if quick else results
        self.file = file or folder / f"{name or benchmark}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = WIDTH

    @property
    def figure(self) -> Path:
        """The file of the figure, beside that of the results."""
        return self.file.with_suffix(".png")

    def describe(self, **settings: Any) -> dict[str, Any]:
        """Return the metadata of this run: machine, versions, command and further settings."""
        return environment.describe(f"benchmarks.{self.benchmark}", self.device, self.dtype) | settings

    def print(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, highlight=False, markup=False)

    def print_device(self, *more: str) -> None:
        """Print the device, the dtype and the number of threads, and what else is known of them."""
        threads = f"{device_name(self.device)}, {self.dtype}, {torch.get_num_threads()} CPU threads"
        self.print("; ".join([threads, *more]))

    def save(self, document: dict[str, Any]) -> None:
        """Write the results; called after every case, so that an aborted run keeps its results."""
        self.file.write_text(json.dumps(document, indent=1) + "\n")

    def finish(self) -> None:
        """Print which files were written."""
        self.print("\n".join(str(file) for file in (self.file, self.figure) if file.exists()))
