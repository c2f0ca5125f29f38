"""Backend ``triton``: the head's operators on CUDA and ROCm devices; see `alignpro_kernels.head` for the interface.

A chunk's logits are computed once, by `logits_kernel`, which takes the statistics from its float32 accumulators and
stores the logits in the inputs' dtype, each tile relative to its mean. `gradient_kernel` turns the stored logits into the
gradient in place and compacts the active rows. The products with W and with the hidden states use the vendor's BLAS. CPU
tensors are supported if TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from alignpro_kernels import reference
from alignpro_kernels.head import Head, HeadGradients, Rows, RowStats, Upstream
from alignpro_kernels.triton_configs import (
    ACCUMULATE,
    ACCUMULATE_WARPS,
    CHOICE,
    COMPILE_OPTIONS,
    GRADIENT,
    GRADIENT_ROWS,
    MERGE,
    MERGE_COLUMNS,
    MIN_TILE_WIDTH,
    NOISE,
    STATISTICS,
)
from alignpro_kernels.triton_gradient import accumulate_kernel, gradient_kernel
from alignpro_kernels.triton_logits import logits_kernel, statistics_kernel
from alignpro_kernels.triton_merge import merge_kernel
from alignpro_kernels.triton_sample import choice_kernel, noise_kernel, sample_kernel
from alignpro_kernels.triton_support import device_guard, interpreting, supports
from alignpro_kernels.types import SampleOutput

_BUDGET = 5 << 28  # bytes stored per chunk: 1.25 GiB
_MAX_ROWS = 8192  # the matrix products reach full speed with far fewer rows
_SAMPLE_ROWS = 4096
_ALIGNMENT = 64  # in elements, so that every row of the stored logits starts on a cache line


@dataclass(frozen=True)
class SavedLogits:
    """What `backward` needs of a chunk's `forward`."""

    logits: Tensor
    """(C, V rounded up) in the inputs' dtype: z − m − a/s, relative to the row's mean within each tile."""
    ref_logits: Tensor | None
    """Likewise, of the reference."""
    partials: Tensor
    """(planes, tiles, C) float32, see `logits_kernel`; includes m, s and a."""
    width: Tensor
    """(1,) int32: the width of the tiles."""


def max_chunk_rows(head: Head, dtype: torch.dtype) -> int:
    """Return the maximum number of rows per chunk: a multiple of 128 within the budget, at least 128."""
    vocabulary = len(head.weight)
    planes = 3 if head.ref_weight is None else 7
    row = head.logits_per_row * dtype.itemsize + planes * 4 * triton.cdiv(vocabulary, MIN_TILE_WIDTH)
    return max(128, min(_MAX_ROWS, _BUDGET // row) // 128 * 128)


def logits_buffer_rows(head: Head) -> int:
    """See `alignpro_kernels.head`."""
    return 0


def forward(head: Head, rows: Rows, *, entropy: bool, save_logits: bool) -> tuple[RowStats, SavedLogits | None]:
    """See `alignpro_kernels.head`."""
    assert rows.target is not None
    _check_device(rows.hidden)
    count, vocabulary, device = len(rows.hidden), len(head.weight), rows.hidden.device
    paired = head.ref_weight is not None and rows.ref_hidden is not None  # policy and reference
    stride = triton.cdiv(vocabulary, _ALIGNMENT) * _ALIGNMENT
    logits = rows.hidden.new_empty(count, stride) if save_logits else None
    ref_logits = rows.hidden.new_empty(count, stride) if save_logits and paired else None
    tiles = triton.cdiv(vocabulary, MIN_TILE_WIDTH)
    partials = torch.empty(7 if paired else 3, tiles, count, dtype=torch.float32, device=device)
    width = torch.empty(1, dtype=torch.int32, device=device)
    softmax_stats = torch.empty(4 if paired else 2, count, dtype=torch.float32, device=device)
    target_logit, logprob = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    stats = RowStats(
        logprob,
        torch.empty_like(logprob) if entropy else None,
        torch.empty_like(logprob) if paired else None,
        softmax_stats,
    )
    temperatures, temperature = _temperature(rows.temperature)
    with device_guard(device):
        logits_kernel[_grid(device, count, vocabulary)](
            rows.hidden,
            head.weight.contiguous(),
            head.bias,
            rows.lora_hidden,
            head.lora_b,
            rows.ref_hidden if paired else None,
            None if head.ref_weight is None else head.ref_weight.contiguous(),
            head.ref_bias,
            temperatures,
            rows.target,
            target_logit,
            partials,
            width,
            logits,
            ref_logits,
            count,
            vocabulary,
            stride,
            partials.stride(0),
            temperature,
            _as_float(head.softcap),
            triton.next_power_of_2(count),
            D=rows.hidden.shape[1],
            REF_D=0 if rows.ref_hidden is None else rows.ref_hidden.shape[1],
            SHARED=head.shared,
            R=0 if rows.lora_hidden is None else rows.lora_hidden.shape[1],
            PRECISION=_precision(rows.hidden.dtype),
            **COMPILE_OPTIONS,
        )
        statistics_kernel[(triton.cdiv(count, STATISTICS["BR"]),)](
            partials,
            width,
            target_logit,
            stats.softmax_stats,
            stats.logprob,
            stats.entropy,
            stats.kl,
            count,
            vocabulary,
            partials.stride(0),
            **STATISTICS,
            **COMPILE_OPTIONS,
        )
    if logits is None:
        return stats, None
    return stats, SavedLogits(logits, ref_logits, partials, width)


def backward(
    head: Head, rows: Rows, saved: SavedLogits, stats: RowStats, upstream: Upstream, gradients: HeadGradients
) -> None:
    """See `alignpro_kernels.head`."""
    active, *coefficients = upstream
    grad_scale = _grad_scale(*coefficients) if rows.hidden.dtype == torch.float16 else None
    du = _logits_gradient(head, rows, saved, stats, upstream, gradients, grad_scale)  # (A, V)
    with device_guard(rows.hidden.device):
        for matrix, row_gradient in ((head.weight, gradients.hidden), (head.lora_b, gradients.lora_hidden)):
            if row_gradient is None or matrix is None:
                continue
            product = _product(du, matrix)
            if grad_scale is not None:
                product = product / grad_scale
            if active is None:
                row_gradient.copy_(product)
            else:
                row_gradient.zero_().index_copy_(0, active, product.to(row_gradient.dtype))
        for x, total in ((rows.hidden, gradients.weight), (rows.lora_hidden, gradients.lora_b)):
            if total is None or x is None:
                continue
            _accumulate(total, du, x if active is None else x[active], grad_scale, gradients.accumulate)


def sample(head: Head, rows: Rows, seeds: Tensor) -> SampleOutput:
    """See `alignpro_kernels.head`."""
    _check_device(rows.hidden)
    count, device = len(rows.hidden), rows.hidden.device
    token = torch.empty(count, dtype=torch.int64, device=device)
    logprob, entropy = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    with device_guard(device):
        for start in range(0, count, _SAMPLE_ROWS):
            chunk = slice(start, start + _SAMPLE_ROWS)
            _sample_chunk(head, rows.select(chunk), seeds[chunk], token[chunk], logprob[chunk], entropy[chunk])
    return SampleOutput(token, logprob, entropy)


def merge_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> Tensor:
    """See `alignpro_kernels.merge_states`; inputs that require a gradient or are float64 use the reference."""
    parts = (*outs, *lses)
    if (torch.is_grad_enabled() and any(x.requires_grad for x in parts)) or outs[0].dtype == torch.float64:
        return reference.merge_states(outs, lses)
    _check_device(outs[0])
    stacked_outs = (outs if isinstance(outs, Tensor) else torch.stack(list(outs))).contiguous()  # (S, ..., D)
    stacked_lses = (lses if isinstance(lses, Tensor) else torch.stack(list(lses))).contiguous()  # (S, ...)
    width = stacked_outs.shape[-1]
    merged = stacked_outs.new_empty(stacked_outs.shape[1:])
    if merged.numel():
        count = merged.numel() // width
        columns = min(MERGE_COLUMNS, triton.next_power_of_2(width))
        grid = (triton.cdiv(count, MERGE["BR"]), triton.cdiv(width, columns))
        with device_guard(merged.device):
            merge_kernel[grid](stacked_outs, stacked_lses, merged, count, D=width, S=len(outs), BD=columns, **MERGE)
    return merged


def gumbel_noise(seeds: Tensor, vocabulary: int) -> Tensor:
    """Return the noise (C, V) float32 that `sample` adds, equal to `noise.gumbel_noise` to about 1e-6."""
    _check_device(seeds)
    out = torch.empty(len(seeds), vocabulary, dtype=torch.float32, device=seeds.device)
    with device_guard(seeds.device):
        noise_kernel[(len(seeds),)](seeds, out, vocabulary, **NOISE)
    return out


def _logits_gradient(
    head: Head,
    rows: Rows,
    saved: SavedLogits,
    stats: RowStats,
    upstream: Upstream,
    gradients: HeadGradients,
    grad_scale: Tensor | None,
) -> Tensor:
    """Return du (A, V) of the active rows, which overwrites the stored logits; also updates the bias's gradient."""
    active, *coefficients = upstream
    chunk, vocabulary = len(rows.hidden), len(head.weight)
    count = chunk if active is None else len(active)
    alone = active is not None or gradients.bias is not None
    temperatures, temperature = _temperature(rows.temperature)
    with device_guard(rows.hidden.device):
        gradient_kernel[(triton.cdiv(vocabulary, MIN_TILE_WIDTH), 1 if alone else triton.cdiv(count, GRADIENT_ROWS))](
            saved.logits,
            saved.ref_logits,
            active,
            saved.partials,
            saved.width,
            stats.softmax_stats,
            stats.entropy,
            stats.kl,
            *coefficients,
            rows.target,
            temperatures,
            gradients.bias,
            grad_scale,
            count,
            chunk,
            vocabulary,
            saved.logits.stride(0),
            saved.partials.stride(0),
            temperature,
            _as_float(head.softcap),
            ADD=gradients.accumulate,
            **GRADIENT,
            **COMPILE_OPTIONS,
        )
    return saved.logits[:count, :vocabulary]


def _sample_chunk(head: Head, rows: Rows, seeds: Tensor, token: Tensor, logprob: Tensor, entropy: Tensor) -> None:
    count, vocabulary, device = len(rows.hidden), len(head.weight), rows.hidden.device
    tiles = triton.cdiv(vocabulary, MIN_TILE_WIDTH)
    partials = torch.empty(5, tiles, count, dtype=torch.float32, device=device)
    best = torch.empty(tiles, count, dtype=torch.int32, device=device)
    width = torch.empty(1, dtype=torch.int32, device=device)
    temperatures, temperature = _temperature(rows.temperature)
    sample_kernel[_grid(device, count, vocabulary)](
        rows.hidden,
        head.weight.contiguous(),
        head.bias,
        rows.lora_hidden,
        head.lora_b,
        temperatures,
        seeds,
        partials,
        best,
        width,
        count,
        vocabulary,
        partials.stride(0),
        temperature,
        _as_float(head.softcap),
        triton.next_power_of_2(count),
        D=rows.hidden.shape[1],
        R=0 if rows.lora_hidden is None else rows.lora_hidden.shape[1],
        PRECISION=_precision(rows.hidden.dtype),
        **COMPILE_OPTIONS,
    )
    choice_kernel[(triton.cdiv(count, CHOICE["BR"]),)](
        partials,
        best,
        width,
        temperatures,
        token,
        logprob,
        entropy,
        count,
        vocabulary,
        partials.stride(0),
        temperature,
        **CHOICE,
        **COMPILE_OPTIONS,
    )


def _product(du: Tensor, matrix: Tensor) -> Tensor:
    """Multiply du (A, V) by (V, D) with float32 sums and results: 16-bit partial sums would lose precision over V."""
    if du.dtype != torch.float32 and _has_mixed_precision_matmul(du):
        return torch.mm(du, matrix, out_dtype=torch.float32)
    return torch.mm(du, matrix)


def _accumulate(total: Tensor, du: Tensor, x: Tensor, grad_scale: Tensor | None, add: bool) -> None:
    """Compute total (V, D) float32 (+)= duᵀ x."""
    x = x.contiguous()
    if grad_scale is None and du.dtype == torch.float32 and not interpreting():
        torch.addmm(total, du.T, x, beta=1.0 if add else 0.0, out=total)
    elif grad_scale is None and _has_mixed_precision_matmul(du):
        if add:
            torch.addmm(total, du.T, x, out_dtype=torch.float32, out=total)
        else:
            torch.mm(du.T, x, out_dtype=torch.float32, out=total)
    else:
        vocabulary, width = total.shape
        grid = (triton.cdiv(vocabulary, ACCUMULATE["BM"]) * triton.cdiv(width, ACCUMULATE["BN"]),)
        accumulate_kernel[grid](
            total,
            du,
            x,
            None if grad_scale is None else 1.0 / grad_scale,
            len(du),
            vocabulary,
            du.stride(0),
            D=width,
            ADD=add,
            PRECISION=_precision(du.dtype),
            **ACCUMULATE,
            num_warps=ACCUMULATE_WARPS,
            **COMPILE_OPTIONS,
        )


def _grad_scale(*coefficients: Tensor | None) -> Tensor:
    """Return, on the device, a power of two that scales float16 gradients to about 1: with α near 1/N, p·α underflows."""
    largest = torch.stack([x.abs().amax() for x in coefficients if x is not None]).amax()
    return torch.exp2(-torch.nan_to_num(largest.log2().floor(), nan=0.0, posinf=0.0).clamp(-24.0, 14.0))


def _has_mixed_precision_matmul(like: Tensor) -> bool:
    """Whether the BLAS multiplies 16-bit matrices into a float32 result."""
    return like.is_cuda and torch.version.hip is None


def _precision(dtype: torch.dtype) -> str:
    """Return Triton's precision for float32 products, following torch's setting; 16-bit inputs are multiplied exactly."""
    rounded = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if rounded and torch.version.hip is None else "ieee"


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return temperature, 1.0
    return None, float(temperature)


def _as_float(x: float | None) -> float | None:
    """Convert a soft-cap to float: Triton would compile an integer as such."""
    return None if x is None else float(x)


def _grid(device: torch.device, count: int, vocabulary: int) -> object:
    """Return the grid of a product: one program per tile, or ``WAVES`` persistent programs per processor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3

    def grid(meta: dict[str, int]) -> tuple[int]:
        tiles = triton.cdiv(count, meta["BM"]) * triton.cdiv(vocabulary, meta["BN"])
        return (min(tiles, meta["WAVES"] * processors) if meta["WAVES"] else tiles,)

    return grid


def _check_device(x: Tensor) -> None:
    if not supports(x.device):
        raise RuntimeError(f"backend 'triton' runs on CUDA and ROCm devices, and the input is on {x.device}")
