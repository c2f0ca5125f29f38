"""The library of operators in C++ for CPUs, csrc/cpu: loaded once, built before that if need be.

Modules whose operators are in it tell PyTorch the shapes of their results, which it takes of loaded operators alone.
"""

from __future__ import annotations

import functools

import torch

from alignpro_kernels.build import BuildError, library


@functools.cache
def unavailable() -> str | None:
    """Why the library cannot be had, None where it is loaded; builds it when it is not there yet."""
    try:
        torch.ops.load_library(str(library()))
    except (BuildError, OSError) as error:
        return str(error)
    return None


def instructions() -> str:
    """The instruction set in use: avx512, avx2 or generic. The library must be loaded."""
    return str(torch.ops.alignpro.head_instructions())
