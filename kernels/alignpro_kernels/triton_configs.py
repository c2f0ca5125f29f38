"""The tiles of all Triton kernels: how many rows, columns and keys a program computes, with how many warps and stages.

For the matrix products with W these are the configurations that the autotuner tries, by dtype, device and number of rows.
Tuning runs once per shape (rows rounded up to a power of two), and Triton caches its choice on disk. The order of
summation depends on the choice: results are bitwise reproducible for one choice, hence within one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from alignpro_kernels.triton_support import interpreting

MIN_TILE_WIDTH = 32 if interpreting() else 64
"""Divides every BN: partial sums are allocated for tiles this narrow, and a program of the gradient has this many columns."""

COMPILE_OPTIONS = {"enable_fp_fusion": True}
"""Compile option of every kernel: a·b + c is rounded once. Set explicitly because Triton 3.10 changes the default."""


STATISTICS = {"BR": 16, "BT": 64}
"""Rows, and tiles at a time, of `statistics_kernel`."""
CHOICE = {"BR": 8, "BT": 64}
"""Likewise of `choice_kernel`."""
GRADIENT = {"BR": 8 if interpreting() else 64, "BV": MIN_TILE_WIDTH}
GRADIENT_ROWS = 128
"""Rows per program of `gradient_kernel` where the rows are split over several programs."""
ACCUMULATE = {"BM": 32, "BN": 32, "BK": 16} if interpreting() else {"BM": 128, "BN": 128, "BK": 32}
ACCUMULATE_WARPS = 1 if interpreting() else 8
NOISE = {"BV": 1024}
MERGE = {"BR": 8}
MERGE_COLUMNS = 256
"""Maximum number of columns per program of `merge_kernel`."""
COMBINE = {"BR": 4}
SEQUENCE_BLOCK = 128
"""Sequences that a program of `attention_kernel` looks through at a time to find its own."""
SPLIT_KEYS = 16 if interpreting() else 512
"""Keys per split: few enough that one sequence of a few thousand keys occupies the device."""
MAX_SPLITS = 64
"""Beyond this, splits become longer instead: each one stores its results in memory."""
SPLIT_WAVES = 2
"""With at least this many programs per processor, keys are not split."""


@dataclass(frozen=True)
class AttentionTile:
    """Rows and keys per program of `attention_kernel`, and how it is compiled."""

    rows: int
    keys: int
    width: int
    """D rounded up to a power of two."""
    warps: int
    stages: int


def attention_tile(dtype: torch.dtype, dim: int, rows: int, *, plain: bool) -> AttentionTile:
    """Choose the tile for ``rows`` rows (queries times heads) per sequence; plain: no soft-cap or window, which use registers."""
    width = max(16, triton.next_power_of_2(dim))
    if interpreting():
        max_rows, keys = 16, 16
    elif dtype == torch.float32:  # without tensor cores, which would need fewer registers
        max_rows, keys = (32, 32) if width <= 64 else (16, 16)
    elif width <= 128:
        max_rows, keys = 128, 64 if plain else 32
    elif width <= 256:
        max_rows, keys = 64 if plain else 32, 32
    else:
        max_rows, keys = 16, 16
    tile_rows = min(max_rows, max(16, triton.next_power_of_2(rows)))
    stages = min(2 if dtype == torch.float32 else 3, max_stages(torch.version.hip is not None))
    return AttentionTile(tile_rows, keys, width, 8 if tile_rows >= 64 else 4, stages)


def max_stages(hip: bool) -> int:
    """Return the maximum number of pipeline stages: CDNA has only 64 KiB of shared memory; tiles take up to 160 elsewhere."""
    return 2 if hip else 8


def _config(bm: int, bn: int, bk: int, group: int, waves: int, warps: int, stages: int) -> triton.Config:
    tile = {"BM": bm, "BN": bn, "BK": bk, "GROUP": group, "WAVES": waves}
    stages = min(stages, max_stages(torch.version.hip is not None))
    return triton.Config(tile, num_warps=warps, num_stages=stages)


# For 16-bit inputs, one accumulator of 128×256, or two of 128×128, fills the registers of eight warps. With smaller tiles
# two programs share a processor, so that one multiplies while the other reduces, which is faster for small D. The last
# configuration fits any device.
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
# The noise needs many registers: at most 32 entries per thread. With few rows the kernel is bound by reading W, so many
# bytes are kept in flight.
SAMPLE = [
    _config(16, 128, 128, 8, 0, 4, 4),
    _config(16, 64, 128, 8, 0, 4, 4),
    _config(32, 128, 128, 8, 0, 8, 3),
    _config(64, 128, 64, 8, 0, 8, 3),
    _config(128, 64, 64, 8, 0, 8, 3),
    _config(16, 64, 32, 8, 0, 4, 3),
]
# In float32, without tensor cores, products need more registers, and a tile twice the shared memory.
SAMPLE_SINGLE = [
    _config(16, 64, 64, 8, 0, 4, 4),
    _config(16, 128, 64, 8, 0, 8, 3),
    _config(32, 64, 64, 8, 0, 8, 3),
    _config(64, 64, 32, 8, 0, 8, 3),
    _config(128, 64, 32, 8, 0, 8, 3),
    _config(16, 64, 32, 8, 0, 4, 3),
]
INTERPRETED = [_config(16, 32, 32, 2, 1, 1, 1)]

LOGITS = INTERPRETED if interpreting() else list(dict.fromkeys(HALF + HALF_WITH_REFERENCE + SINGLE))
SAMPLES = INTERPRETED if interpreting() else list(dict.fromkeys(SAMPLE + SAMPLE_SINGLE))


def prune_logits_configs(
    configs: list[triton.Config], named_args: dict[str, Any], **options: Any
) -> list[triton.Config]:
    """Select from `LOGITS` the configurations for the call's dtype, reference, soft-cap and number of rows."""
    call = {**named_args, **options}
    table = candidates(call["hidden"].dtype, reference=call["REF_D"] > 0, capped=call["softcap"] is not None)
    return _by_rows([c for c in configs if c in table], call["rows"])


def prune_sample_configs(
    configs: list[triton.Config], named_args: dict[str, Any], **options: Any
) -> list[triton.Config]:
    """Select from `SAMPLES` those for the dtype that cover the rows with few tiles, none much taller than the rows."""
    call = {**named_args, **options}
    table = sample_candidates(call["hidden"].dtype)
    configs = [c for c in configs if c in table and 8 * c.kwargs["BM"] >= min(call["rows"], 1024)]
    return _by_rows(configs, call["rows"])


def candidates(dtype: torch.dtype, *, reference: bool, capped: bool) -> list[triton.Config]:
    """Return the configurations of `logits_kernel` for inputs of a dtype."""
    table = SINGLE if dtype == torch.float32 else HALF_WITH_REFERENCE if reference else HALF
    if not capped:
        return table
    # tanh needs registers, which would spill with more than 64 accumulators per thread.
    sums = 2 if reference else 1
    return [c for c in table if sums * c.kwargs["BM"] * c.kwargs["BN"] <= 64 * 32 * c.num_warps]


def sample_candidates(dtype: torch.dtype) -> list[triton.Config]:
    """Return the configurations of `sample_kernel` for inputs of a dtype."""
    if interpreting():
        return INTERPRETED
    return SAMPLE_SINGLE if dtype == torch.float32 else SAMPLE


def _by_rows(configs: list[triton.Config], rows: int) -> list[triton.Config]:
    shortest = min(c.kwargs["BM"] for c in configs)
    return [c for c in configs if c.kwargs["BM"] <= max(shortest, triton.next_power_of_2(rows))]
