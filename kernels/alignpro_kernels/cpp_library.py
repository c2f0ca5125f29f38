"""The library of C++ operators for CPUs, csrc/cpu: loaded once, after building it if necessary."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import functools
import os

import torch

from alignpro_kernels.build import BuildError, library

_STATES = "ALIGNPRO_CPU_BFLOAT16"


@functools.cache
def unavailable() -> str | None:
    """Load the library, building it if necessary; return the reason why that failed, or None if it is loaded.

    Raises:
        ValueError: The environment variable ``ALIGNPRO_CPU_BFLOAT16`` has an unknown value.
    """
    if (asked := os.environ.get(_STATES, "")) not in ("", "widened", "rounded", "split"):
        raise ValueError(f"{_STATES} is {asked!r}: expected widened, rounded or split")
    try:
        torch.ops.load_library(str(library()))
    except (BuildError, OSError) as error:
        return str(error)
    _register_fakes()
    return None


def instructions() -> str:
    """Return the instruction set in use: amx, avx512_bf16, avx512, avx2, neon or generic. The library must be loaded."""
    return str(torch.ops.alignpro.cpu_instructions())


def state_parts() -> int:
    """Return how states are multiplied by weights in bfloat16: as sums of one or two bfloat16, or 0, as float32.

    The environment variable ``ALIGNPRO_CPU_BFLOAT16`` (rounded, split or widened) chooses before the library is loaded;
    without it, states are split in two where AMX multiplies them. The library must be loaded.
    """
    return int(torch.ops.alignpro.cpu_state_parts())


def _register_fakes() -> None:
    """Register the shapes of the operators' results, for tracing; PyTorch accepts them only for operators that exist."""
    fake = torch.library.register_fake

    @fake("alignpro::head_statistics")
    def _(hidden, *rest):
        row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        kl = hidden.new_empty(0 if rest[8] is None else hidden.shape[0], dtype=torch.float32)
        return row, torch.empty_like(row), kl, row.new_empty(4, hidden.shape[0])

    @fake("alignpro::head_gradient")
    def _(*arguments):
        return None

    @fake("alignpro::head_sample")
    def _(hidden, *rest):
        row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        return hidden.new_empty(hidden.shape[0], dtype=torch.int64), row, torch.empty_like(row)

    @fake("alignpro::cascade_attention")
    def _(query, *rest):
        return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)

    @fake("alignpro::pack_weight")
    def _(weight):
        return weight.new_empty((weight.shape[0] + 31) // 32, weight.shape[1], 32)

    @fake("alignpro::packed_linear")
    def _(x, packed, bias, outputs):
        return x.new_empty(*x.shape[:-1], outputs)

    @fake("alignpro::packed_gate")
    def _(x, gate, up, outputs):
        return x.new_empty(*x.shape[:-1], outputs)

    @fake("alignpro::decoder_stack")
    def _(hidden, *rest):
        return torch.empty_like(hidden)
