"""The libraries of variable-length attention, and which of them can run here.

Which of them runs is decided by `timed_trial`: those that are not installed or do not support the input are left out by
`VarlenKernels.unavailable` and `unsupported`, the others are tried.
"""

from __future__ import annotations

import functools

from alignpro_kernels.flash_attn_packages import Flash2, Flash3, Flash4
from alignpro_kernels.torch_flash import TorchFlash
from alignpro_kernels.varlen import VarlenKernels

KERNELS: tuple[VarlenKernels, ...] = (Flash4(), Flash3(), Flash2(), TorchFlash())
"""All libraries, the newest kernels first."""


def available() -> list[VarlenKernels]:
    """The libraries that can run here, the newest kernels first."""
    return [kernels for kernels in KERNELS if why_unavailable(kernels) is None]


@functools.cache
def why_unavailable(kernels: VarlenKernels) -> str | None:
    """`VarlenKernels.unavailable`, found out once: it is asked in every layer."""
    return kernels.unavailable()
