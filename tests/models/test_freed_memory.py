"""Freed memory goes back to the system."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from alignpro.models.freed_memory import return_freed_memory


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_lies_between_pieces_in_use_goes_back() -> None:
    pieces = [bytearray(b"x") * 50_000 for _ in range(2_000)]  # too small to be mapped one by one
    del pieces[:-1]
    kept = resident()
    return_freed_memory()
    assert kept - resident() > 50e6
