"""Backend ``cpp``: the head on a CPU, by the operators of csrc/cpu.

The vocabulary is cut into tiles that are dealt to the threads; a tile's logits are made and reduced while they are in the
cache. Rows in flight are what costs memory, since their logits are kept from the statistics to the gradient; each chunk reads
W twice and dW twice, so too few rows make those the bottleneck. Where the weight is trained, the first chunk's logits need no
memory of their own: a tile's are kept where the tile's rows of dW will be, which overwrite them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from alignpro_kernels import cpp_library
from alignpro_kernels.head import Head, HeadGradients, Rows, RowStats
from alignpro_kernels.types import SampleOutput

_BUDGET = 224 << 20  # bytes of logits in flight, and of the threads' sums
_FEWEST_ROWS = 64  # below, W and dW pass through memory more often than a larger budget would cost


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot run here, None if it can; builds the library when it is not there yet."""
    reason = cpp_library.unavailable()
    if reason is None:
        _register_fakes()
    return reason


def rows_in_flight(head: Head, dtype: torch.dtype) -> int:
    """The most rows of one chunk."""
    floats = head.logits_per_row + torch.get_num_threads() * head.weight.shape[1]
    return max(_FEWEST_ROWS, _BUDGET // (4 * floats))


def rows_in_gradient(head: Head) -> int:
    """See `alignpro_kernels.head`: a tile of logits is C × width, of the gradient width × D."""
    return head.weight.shape[1] // _sets(head)


def weight_gradient(head: Head) -> Tensor:
    """See `alignpro_kernels.head`: (V, D) float32, in memory of whole tiles."""
    vocabulary, dim = head.weight.shape
    memory = torch.empty((vocabulary + torch.ops.alignpro.head_widest_tile()) * dim)
    return torch.empty(0).set_(memory.untyped_storage(), 0, (vocabulary, dim), (dim, 1))


def forward(
    head: Head, rows: Rows, *, entropy: bool, keep: bool, room: Tensor | None = None
) -> tuple[RowStats, Tensor | None]:
    """See `alignpro_kernels.head`; what is kept are the logits in tiles, (1 or 2, tiles, C, width)."""
    logits = None
    if keep:
        count, dim = len(rows.hidden), head.weight.shape[1]
        tiles, width = torch.ops.alignpro.head_tiling(len(head.weight), 0 if room is None else count)
        if room is None:
            logits = torch.ops.alignpro.workspace([_sets(head), tiles, count, width])
        else:
            sizes, strides = (_sets(head), tiles, count, width), (count * width, width * dim, width, 1)
            logits = torch.empty(0).set_(room.untyped_storage(), 0, sizes, strides)
    logprob, h, kl, norms = torch.ops.alignpro.head_statistics(
        rows.hidden,
        head.weight,
        head.bias,
        rows.target,
        _temperature(rows),
        head.softcap or 0.0,
        rows.low_rank,
        head.low_rank,
        rows.ref_hidden,
        head.ref_weight,
        head.ref_bias,
        logits,
    )
    return RowStats(logprob, h if entropy else None, kl if head.ref_weight is not None else None, norms), logits


def backward(
    head: Head,
    rows: Rows,
    kept: Tensor,
    stats: RowStats,
    active: Tensor | None,
    alpha: Tensor | None,
    eta: Tensor | None,
    kappa: Tensor | None,
    gradients: HeadGradients,
) -> None:
    """See `alignpro_kernels.head`."""
    torch.ops.alignpro.head_gradient(
        kept,
        stats.norms,
        stats.entropy,
        stats.kl,
        rows.hidden,
        head.weight,
        rows.target,
        _temperature(rows),
        head.softcap or 0.0,
        rows.low_rank,
        head.low_rank,
        active,
        alpha,
        eta,
        kappa,
        gradients.hidden,
        gradients.low_rank_rows,
        gradients.weight,
        gradients.bias,
        gradients.low_rank,
        gradients.accumulate,
    )


def sample(head: Head, rows: Rows, seeds: Tensor) -> SampleOutput:
    """See `alignpro_kernels.head`."""
    return SampleOutput(
        *torch.ops.alignpro.head_sample.default(
            rows.hidden,
            head.weight,
            head.bias,
            _temperature(rows),
            head.softcap or 0.0,
            seeds,
            rows.low_rank,
            head.low_rank,
        )
    )


def release_workspace() -> None:
    """Free the memory for logits that is kept from one call to the next."""
    if unavailable() is None:
        torch.ops.alignpro.release_workspace()


def _sets(head: Head) -> int:
    """Of logits: the policy's, and the reference's."""
    return 1 if head.ref_weight is None else 2


def _temperature(rows: Rows) -> Tensor | None:
    """(C,), or None where it is 1 for all."""
    if isinstance(rows.temperature, Tensor):
        return rows.temperature
    return None if rows.temperature == 1.0 else torch.full((len(rows.hidden),), float(rows.temperature))


def _register_fakes() -> None:
    """Shapes of the results, for tracing."""

    @torch.library.register_fake("alignpro::head_statistics")
    def _(hidden, *rest):  # type: ignore[no-untyped-def]
        count, reference = hidden.shape[0], rest[8] is not None
        row = hidden.new_empty(count, dtype=torch.float32)
        kl = hidden.new_empty(count if reference else 0, dtype=torch.float32)
        return row, torch.empty_like(row), kl, hidden.new_empty(4, count, dtype=torch.float32)

    @torch.library.register_fake("alignpro::head_gradient")
    def _(*arguments):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("alignpro::head_sample")
    def _(hidden, *rest):  # type: ignore[no-untyped-def]
        row = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        return hidden.new_empty(hidden.shape[0], dtype=torch.int64), row, torch.empty_like(row)
