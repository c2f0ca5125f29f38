"""Backend ``cpp``: the head's operators on a CPU, implemented in csrc/cpu.

The vocabulary is split into tiles, which are distributed over the threads; a tile's logits are computed and reduced while
they are in the cache. Memory use is determined by the rows of a chunk, whose logits are saved from the statistics to the
gradient. Each chunk reads W twice and dW twice, so memory bandwidth becomes the bottleneck if a chunk has too few
rows. If the weight is trained, the first chunk's logits need no memory of their own: each tile's logits are stored where
that tile's rows of dW will be, which later overwrite them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro_kernels import cpp_library
from alignpro_kernels.head import Head, HeadGradients, Rows, RowStats, Upstream
from alignpro_kernels.types import SampleOutput

_BUDGET = 224 << 20  # bytes for a chunk's logits and the threads' partial sums
_MIN_ROWS = 64  # with fewer rows, rereading W and dW costs more than exceeding the budget


def max_chunk_rows(head: Head, dtype: torch.dtype) -> int:
    """Return the maximum number of rows per chunk."""
    floats = head.logits_per_row + torch.get_num_threads() * head.weight.shape[1]
    return max(_MIN_ROWS, _BUDGET // (4 * floats))


def logits_buffer_rows(head: Head) -> int:
    """See `alignpro_kernels.head`: a tile of logits has C × width elements, a tile of the gradient width × D."""
    return head.weight.shape[1] // _logits_sets(head)


def empty_weight_gradient(head: Head) -> Tensor:
    """See `alignpro_kernels.head`: (V, D) float32, allocated in whole tiles."""
    vocabulary, dim = head.weight.shape
    memory = _empty((vocabulary + torch.ops.alignpro.head_widest_tile()) * dim)
    return _empty(0).set_(memory.untyped_storage(), 0, (vocabulary, dim), (dim, 1))


def forward(
    head: Head, rows: Rows, *, entropy: bool, save_logits: bool, logits_buffer: Tensor | None = None
) -> tuple[RowStats, Tensor | None]:
    """See `alignpro_kernels.head`; keeps the logits in tiles, (1 or 2, tiles, C, width)."""
    logits = None
    if save_logits:
        count, dim = len(rows.hidden), head.weight.shape[1]
        tiles, width = torch.ops.alignpro.head_tiling(len(head.weight), 0 if logits_buffer is None else count)
        if logits_buffer is None:
            logits = torch.ops.alignpro.workspace([_logits_sets(head), tiles, count, width])
        else:
            sizes, strides = (_logits_sets(head), tiles, count, width), (count * width, width * dim, width, 1)
            logits = _empty(0).set_(logits_buffer.untyped_storage(), 0, sizes, strides)
    logprob, h, kl, softmax_stats = torch.ops.alignpro.head_statistics(
        rows.hidden,
        head.weight,
        head.bias,
        rows.target,
        _temperature(rows),
        head.softcap or 0.0,
        rows.lora_hidden,
        head.lora_b,
        rows.ref_hidden,
        head.ref_weight,
        head.ref_bias,
        logits,
    )
    return RowStats(logprob, h if entropy else None, kl if head.ref_weight is not None else None, softmax_stats), logits


def backward(
    head: Head, rows: Rows, saved: Tensor, stats: RowStats, upstream: Upstream, gradients: HeadGradients
) -> None:
    """See `alignpro_kernels.head`."""
    torch.ops.alignpro.head_gradient(
        saved,
        stats.softmax_stats,
        stats.entropy,
        stats.kl,
        rows.hidden,
        head.weight,
        rows.target,
        _temperature(rows),
        head.softcap or 0.0,
        rows.lora_hidden,
        head.lora_b,
        *upstream,
        gradients.hidden,
        gradients.lora_hidden,
        gradients.weight,
        gradients.bias,
        gradients.lora_b,
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
            rows.lora_hidden,
            head.lora_b,
        )
    )


def release_workspace() -> None:
    """Free the memory for logits that is otherwise reused by the next call."""
    if cpp_library.unavailable() is None:
        torch.ops.alignpro.release_workspace()


def _logits_sets(head: Head) -> int:
    """Return the number of sets of logits: the policy's, and with a reference also the reference's."""
    return 1 if head.ref_weight is None else 2


def _temperature(rows: Rows) -> Tensor | None:
    """Return the temperatures (C,), or None if all are 1."""
    if isinstance(rows.temperature, Tensor):
        return rows.temperature
    return None if rows.temperature == 1.0 else _empty(len(rows.hidden)).fill_(float(rows.temperature))


def _empty(size: int) -> Tensor:
    """Return uninitialised float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")
