"""The software versions and the device that a result depends on, for summaries and reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import alignpro

_PACKAGES = ("torch", "triton", "transformers", "peft", "datasets", "tokenizers", "deepspeed")


def versions() -> dict[str, str]:
    """Return name → version of this project, Python and the packages that affect results, and the device's name."""
    found = {"alignpro": alignpro.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"
    )
    return found
