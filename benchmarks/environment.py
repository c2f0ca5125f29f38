"""The environment in which a result was measured: device, versions, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "alignpro",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
)

OUTPUTS = ("--json", "--out")
"""Options that say where results are written."""


def describe(module: str, device: torch.device, dtype: torch.dtype, arguments: list[str]) -> dict[str, Any]:
    """Return the metadata for a results file; ``module`` is the module run by ``python -m``."""
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"type": device.type, "name": device_name(device)},
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", information.read_text(), flags=re.MULTILINE)
        if names:
            return f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """Return the name of the results folder, such as ``cpu`` or ``nvidia-h200``."""
    return "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def command_line() -> list[str]:
    """Return the command-line arguments, without the output paths, which are of one machine and change no figure."""
    kept: list[str] = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in OUTPUTS:
            next(arguments, None)
        elif not argument.startswith(tuple(f"{option}=" for option in OUTPUTS)):
            kept.append(argument)
    return kept


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
