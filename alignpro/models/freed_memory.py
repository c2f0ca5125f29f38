"""Memory that has been freed and that the C library keeps: after much has been freed at once, the system gets it back."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Give the system the pages of this process that hold nothing any more; only glibc can, with others nothing happens.

    glibc keeps what is freed between pieces that are in use, for later allocations of the same size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
