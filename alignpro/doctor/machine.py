"""The machine, and the compilers on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from alignpro.doctor.findings import Finding, program_output
from alignpro.models.cpu.threads import cpu_quota, num_cores


def system() -> Iterator[Finding]:
    """The operating system and Python."""
    detail, quota = f"{platform.system()} {platform.machine()}, {num_cores()} cores", cpu_quota()
    if quota is None or quota >= 1:
        yield Finding("Machine", "system", "ok", detail + ("" if quota is None else f", a quota of {quota:g}"))
    else:
        remedy = "computation stops whenever the quota is used up: give the container at least one core"
        yield Finding("Machine", "system", "problem", f"{detail}, a quota of {quota:g}", remedy)
    yield Finding("Machine", "python", "ok", f"{platform.python_version()} at {sys.executable}")


def compilers() -> Iterator[Finding]:
    """The compilers that the kernel build looks for, in the same order."""
    candidates = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    cuda_home = os.environ.get("CUDA_HOME")
    cuda = [str(Path(cuda_home) / "bin" / "nvcc"), "nvcc"] if cuda_home else ["nvcc"]
    for name, programs, remedy in (
        ("c++", candidates, "the CPU kernels need one: install g++ with the system's package manager"),
        ("nvcc", cuda, "optional, for CUDA sources: install the CUDA toolkit, or set CUDA_HOME"),
    ):
        path = next(filter(None, map(shutil.which, programs)), None)
        output = program_output(path, "--version") if path else None
        if path is None:
            yield Finding("Compilers", name, "off", f"{', '.join(programs)} not found", remedy)
        elif output is None:
            yield Finding("Compilers", name, "problem", f"{path} does not run", remedy)
        else:
            version = re.search(r"release \S+|\d+(\.\d+)+", output)
            yield Finding("Compilers", name, "ok", f"{version[0].rstrip(',') if version else 'runs'}, {path}")
