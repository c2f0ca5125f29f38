"""The device that a benchmark runs on."""

from __future__ import annotations

import gc
import platform
import re
from pathlib import Path

import torch
import typer

from benchmarks import hardware

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """Return the device of an option.

    Raises:
        typer.BadParameter: There is no device of that name.
    """
    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise typer.BadParameter(f"device {name!r}: use cpu, cuda or auto") from None


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


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


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


def folder_name(device: torch.device) -> str:
    """Return the name of the folder of a device's results, such as ``cpu`` or ``nvidia-h200``."""
    return "cpu" if device.type == "cpu" else hardware.slug(device_name(device))


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Release unused memory, so that one entrant's leftovers do not reduce another's."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
