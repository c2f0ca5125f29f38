"""The devices that torch and Triton see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from alignpro.doctor.findings import Finding, program_output


def torch_build() -> Iterator[Finding]:
    """The build of torch, and the CPU as it sees it."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("Devices", "torch build", "ok", f"{torch.__version__}, {build or 'CPU only'}")
    yield Finding("Devices", "cpu", "ok", f"{torch.get_num_threads()} threads, vector instructions {capability}")


def gpus() -> Iterator[Finding]:
    """The accelerators, or why there is none."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            architecture = (
                properties.gcnArchName if torch.version.hip else f"capability {properties.major}.{properties.minor}"
            )
            memory = f"{properties.total_memory / 2**30:.1f} GiB"
            yield Finding("Devices", f"cuda:{index}", "ok", f"{properties.name}, {memory}, {architecture}")
        return
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    driver = _driver()
    if accelerator is not None:
        yield Finding("Devices", accelerator.type, "ok", f"{torch.accelerator.device_count()} devices")
    elif driver is None:
        yield Finding("Devices", "gpu", "off", "none found: everything runs on the CPU")
    elif torch.version.cuda is None and torch.version.hip is None:
        detail = f"{driver} is present, but torch is built for the CPU only"
        yield Finding("Devices", "gpu", "problem", detail, "make setup, which installs the GPU build on such a machine")
    else:
        detail = f"{driver} is present, but torch sees no device"
        yield Finding("Devices", "gpu", "problem", detail, "check the driver's version and CUDA_VISIBLE_DEVICES")


def _driver() -> str | None:
    """Return a sign of a GPU driver, detected as in the Makefile, or None."""
    for tool in ("nvidia-smi", "rocm-smi"):
        if shutil.which(tool) and program_output(tool) is not None:
            return tool
    return "/dev/nvidia0" if Path("/dev/nvidia0").exists() else None


def triton() -> Iterator[Finding]:
    """Whether Triton kernels can run."""
    import torch

    try:
        from triton import __version__ as version
    except ModuleNotFoundError:
        yield Finding("Devices", "triton", "off", "not installed: the Triton kernels cannot run", "make setup")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding("Devices", "triton", "ok", f"{version}, interpreted: on the CPU, for tests")
    elif torch.cuda.is_available():
        yield Finding("Devices", "triton", "ok", f"{version}, compiled")
    else:
        detail = f"{version}, no device to run on"
        yield Finding("Devices", "triton", "off", detail, "TRITON_INTERPRET=1 interprets the kernels on the CPU")
