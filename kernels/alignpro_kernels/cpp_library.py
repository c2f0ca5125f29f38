"""The library of C++ operators for CPUs, csrc/cpu: loaded once, after building it if necessary.

The modules that wrap its operators register fake implementations with PyTorch after loading it, since PyTorch accepts
them only for operators that exist.
"""

from __future__ import annotations

import functools

import torch

from alignpro_kernels.build import BuildError, library


@functools.cache
def unavailable() -> str | None:
    """Load the library, building it if necessary; return the reason why that failed, or None if it is loaded."""
    try:
        torch.ops.load_library(str(library()))
    except (BuildError, OSError) as error:
        return str(error)
    return None


def instructions() -> str:
    """Return the instruction set in use: avx512, avx2 or generic. The library must be loaded."""
    return str(torch.ops.alignpro.head_instructions())
