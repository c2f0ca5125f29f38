"""Tiles of the products: what tuning tries, by dtype, device and number of rows.

Tuning runs once for a shape (rows rounded up to a power of two), and Triton keeps its choice on disk. Sums are taken in
an order that depends on the choice: results are equal bit for bit for one choice, hence within one process.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from alignpro_kernels.triton_support import interpreting

NARROWEST = 32 if interpreting() else 64
"""Divides every BN: partial sums are allotted for tiles this narrow, and the gradient takes columns by as many."""

FUSED = {"enable_fp_fusion": True}
"""How every kernel is compiled: a·b + c rounded once. Triton's default for it changes with 3.10."""


def most_stages(hip: bool) -> int:
    """How deep loads may run ahead: CDNA has 64 KiB of local memory, for tiles that take 160 elsewhere."""
    return 2 if hip else 8


def _config(bm: int, bn: int, bk: int, group: int, waves: int, warps: int, stages: int) -> triton.Config:
    tile = {"BM": bm, "BN": bn, "BK": bk, "GROUP": group, "WAVES": waves}
    stages = min(stages, most_stages(torch.version.hip is not None))
    return triton.Config(tile, num_warps=warps, num_stages=stages)


# In 16 bits one accumulator of 128×256, or two of 128×128, fills eight warps' registers. Smaller tiles let two programs
# share a processor, so that one multiplies while the other reduces: better where D is small. The last fits any device.
HALF = [
    _config(128, 256, 64, 16, 0, 8, 3),
    _config(128, 256, 64, 16, 1, 8, 3),
    _config(128, 128, 64, 16, 0, 8, 3),
    _config(128, 128, 64, 16, 2, 4, 3),
    _config(64, 256, 64, 32, 0, 8, 3),
    _config(64, 128, 32, 32, 0, 4, 3),
]
HALF_WITH_REFERENCE = [
    _config(128, 128, 64, 16, 0, 8, 3),
    _config(128, 128, 64, 16, 1, 8, 3),
    _config(128, 64, 64, 16, 0, 4, 3),
    _config(64, 128, 64, 32, 0, 8, 3),
    _config(64, 128, 32, 32, 0, 8, 3),
]
SINGLE = [
    _config(128, 64, 32, 16, 0, 8, 3),
    _config(64, 64, 32, 32, 0, 8, 3),
    _config(64, 64, 16, 32, 0, 4, 3),
]
# The noise takes many registers: at most 32 entries a thread. Few rows are bound by reading W: many bytes in flight.
SAMPLE = [
    _config(16, 128, 128, 8, 0, 4, 4),
    _config(16, 64, 128, 8, 0, 4, 4),
    _config(32, 128, 128, 8, 0, 8, 3),
    _config(64, 128, 64, 8, 0, 8, 3),
    _config(128, 64, 64, 8, 0, 8, 3),
    _config(16, 64, 32, 8, 0, 4, 3),
]
INTERPRETED = [_config(16, 32, 32, 2, 1, 1, 1)]

LOGITS = INTERPRETED if interpreting() else list(dict.fromkeys(HALF + HALF_WITH_REFERENCE + SINGLE))
SAMPLES = INTERPRETED if interpreting() else SAMPLE


def fitting(configs: list[triton.Config], named_args: dict[str, Any], **options: Any) -> list[triton.Config]:
    """Of `LOGITS` those for the call's dtype, reference and soft-cap, with no tile much taller than the rows."""
    call = {**named_args, **options}
    table = candidates(call["hidden"].dtype, reference=call["REF_D"] > 0, capped=call["softcap"] is not None)
    return _by_rows([c for c in configs if c in table], call["rows"])


def sample_fitting(configs: list[triton.Config], named_args: dict[str, Any], **options: Any) -> list[triton.Config]:
    """Of `SAMPLES` those that hold the rows in few tiles, none much taller than the rows."""
    call = {**named_args, **options}
    return _by_rows([c for c in configs if 8 * c.kwargs["BM"] >= min(call["rows"], 1024)], call["rows"])


def candidates(dtype: torch.dtype, *, reference: bool, capped: bool) -> list[triton.Config]:
    """The configurations of `logits_kernel` for inputs of a dtype."""
    table = SINGLE if dtype == torch.float32 else HALF_WITH_REFERENCE if reference else HALF
    if not capped:
        return table
    # tanh needs registers: at most 64 sums a thread, which would spill beside more.
    sums = 2 if reference else 1
    return [c for c in table if sums * c.kwargs["BM"] * c.kwargs["BN"] <= 64 * 32 * c.num_warps]


def _by_rows(configs: list[triton.Config], rows: int) -> list[triton.Config]:
    shortest = min(c.kwargs["BM"] for c in configs)
    return [c for c in configs if c.kwargs["BM"] <= max(shortest, triton.next_power_of_2(rows))]
