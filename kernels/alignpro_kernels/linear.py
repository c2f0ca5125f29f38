"""Linear layers with packed weights, on a CPU: csrc/cpu/linear.cpp.

A weight (N, K) is split into panels of `PANEL` outputs. Within a panel the weights of one input are contiguous, which is the
order in which a matrix product reads them. Packing costs about as much as one product with a single row. Each output sums
over its inputs in a fixed order, so a row's results have the same bits in any batch; no BLAS guarantees that.

Weights may be bfloat16, which halves what a product with few rows reads. They are widened in registers: results have the
bits of products with the same weights in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro_kernels.backends import BackendError, unavailable

PANEL = 32
"""Number of outputs per panel."""
WEIGHTS = (torch.float32, torch.bfloat16)
"""The dtypes of packed weights."""


def pack_weight(weight: Tensor) -> Tensor:
    """Pack a weight into panels.

    Args:
        weight: (N, K) float32 or bfloat16, on the CPU; contiguous, or the transpose of a contiguous matrix. K is even
            for bfloat16.

    Returns:
        (⌈N / PANEL⌉, K, PANEL) in the dtype of ``weight``, zero-padded beyond the last output. In bfloat16, the elements
        of two inputs alternate.

    Raises:
        ValueError: ``weight`` has another shape, dtype or device.
        BackendError: The library of C++ operators is not available.
    """
    odd = weight.dtype == torch.bfloat16 and weight.shape[-1] % 2
    if weight.ndim != 2 or weight.dtype not in WEIGHTS or weight.device.type != "cpu" or not weight.numel() or odd:
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}: expected (N, K) float32, or "
            "bfloat16 with an even K, on the CPU, not empty"
        )
    if (reason := unavailable("cpp")) is not None:
        raise BackendError(f"pack_weight: {reason}")
    packed: Tensor = torch.ops.alignpro.pack_weight(weight.detach())
    return packed


def packed_linear(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + b, without gradient.

    Args:
        x: (..., K) float32, on the CPU.
        packed: W, packed by `pack_weight`.
        outputs: N.
        bias: (N,) float32.

    Returns:
        (..., N) float32.

    Raises:
        ValueError: Shapes or dtypes do not match.
    """
    _check(x, packed, outputs)
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (outputs,)):
        raise ValueError(f"bias is {bias.dtype} of shape {tuple(bias.shape)}: expected ({outputs},) float32")
    out: Tensor = torch.ops.alignpro.packed_linear.default(x, packed, bias, outputs)
    return out


def packed_gate(x: Tensor, gate: Tensor, up: Tensor, outputs: int) -> Tensor:
    """Compute silu(x Gᵀ) · (x Uᵀ), without gradient; a panel's two products are combined while they are in the cache.

    Args:
        x: (..., K) float32, on the CPU.
        gate: G (N, K), packed by `pack_weight`.
        up: U (N, K), likewise.
        outputs: N.

    Returns:
        (..., N) float32.

    Raises:
        ValueError: Shapes or dtypes do not match.
    """
    _check(x, gate, outputs)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up is {up.dtype} of packed shape {tuple(up.shape)} and gate {gate.dtype} of {tuple(gate.shape)}: they must "
            "agree"
        )
    out: Tensor = torch.ops.alignpro.packed_gate.default(x, gate, up, outputs)
    return out


def _check(x: Tensor, packed: Tensor, outputs: int) -> None:
    if x.dtype != torch.float32 or packed.dtype not in WEIGHTS or x.device.type != "cpu":
        raise ValueError(
            f"x is {x.dtype} on {x.device} and the weight is {packed.dtype}: expected float32 on the CPU, and a weight in "
            "float32 or bfloat16"
        )
    panels = (outputs + PANEL - 1) // PANEL
    if x.ndim == 0 or packed.shape != (panels, x.shape[-1], PANEL):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the packed weight has {tuple(packed.shape)}: expected (..., K) and, for "
            f"{outputs} outputs, ({panels}, K, {PANEL})"
        )
