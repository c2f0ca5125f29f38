"""All layers of a decoder in one call, on a CPU: csrc/cpu/decoder.cpp.

A decoder's layer is some thirty operations of PyTorch, and a tick of generation calls them for a few rows each, for which
beginning an operation costs as much as the operation. Here a tick is one call, which leaves out what a layer writes only to
read it again: products add to the residual stream as they end, gates are taken while they are in the cache, keys and values
go from their rotation to the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro_kernels import cpp_library
from alignpro_kernels.attention import CascadeLevel
from alignpro_kernels.linear import PANEL

_ROWS_IN_FLIGHT = 512
"""Tokens whose states inside a gated layer are there at a time."""


@functools.cache
def unavailable() -> str | None:
    """Why the operator cannot be had here, None if it can; builds the library when it is not there yet."""
    reason = cpp_library.unavailable()
    if reason is None:
        _register_fake()
    return reason


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer, float32 on the CPU; matrices are packed by `pack_weight`.

    h = x + out(attention(rotate(qkv(norm(x)))))        x' = h + down(silu(gate(norm'(h))) · up(norm'(h)))
    """

    norm: Tensor
    """(D,)"""
    qkv: Tensor
    """Of queries, keys and values, behind one another: (H + 2 H') head_dim outputs, D inputs."""
    out: Tensor
    """D outputs, H head_dim inputs."""
    inner_norm: Tensor
    """(D,)"""
    gate: Tensor
    """I outputs, D inputs."""
    up: Tensor
    """As ``gate``."""
    down: Tensor
    """D outputs, I inputs."""
    qkv_bias: Tensor | None = None
    """((H + 2 H') head_dim,)"""
    query_norm: Tensor | None = None
    """(head_dim,): of each query, before its rotation."""
    key_norm: Tensor | None = None
    window: int | None = None
    """Positions that a query sees, its own included; None for all before it."""


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of all layers, and what they have in common."""

    layers: Sequence[DecoderLayer]
    norm: Tensor
    """(D,): after the last layer."""
    eps: float
    """Of norms: x / √(mean(x²) + ε) · (weight + offset)."""
    offset: float
    scale: float
    """Of scores."""
    softcap: float | None
    """Scores become softcap · tanh(score / softcap)."""

    @functools.cached_property
    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Norms, matrices, and what a layer may lack, in the operator's order."""
        layers = self.layers
        norms = [weight for layer in layers for weight in (layer.norm, layer.inner_norm)] + [self.norm]
        matrices = [m for layer in layers for m in (layer.qkv, layer.out, layer.gate, layer.up, layer.down)]
        return norms, matrices, [x for layer in layers for x in (layer.qkv_bias, layer.query_norm, layer.key_norm)]


@torch.no_grad()
def decoder_stack(
    hidden: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    pages: Sequence[Tensor],
    slots: Tensor,
    levels: Sequence[CascadeLevel],
) -> Tensor:
    """The last hidden states of T tokens of some sequences; their keys and values are put into pages.

    A token's result is a function of its own sequence: the same bits in every batch and with every number of threads.

    Args:
        hidden: (T, D) float32 on the CPU: the tokens' embeddings.
        weights: Of the layers.
        cos: (T, R) float32: the rotary embedding of each token, whose pairs are R / 2 elements apart. R ≤ head_dim.
        sin: As ``cos``.
        pages: Each layer's view of the pool, see `write_kv`.
        slots: (T,) int64: where keys and values go, −1 for nowhere.
        levels: What each token sees, see `cascade_attention`.

    Returns:
        (T, D) float32, after the last norm.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    tokens, dim = hidden.shape
    layers = weights.layers
    if len(pages) != len(layers):
        raise ValueError(f"pages has {len(pages)} layers and weights {len(layers)}: they must agree")
    head_dim = pages[0].shape[-1]
    width = (layers[0].out.shape[1] + 2 * pages[0].shape[3] * head_dim + PANEL - 1) // PANEL
    if layers[0].qkv.shape[:2] != (width, dim) or layers[0].out.shape[1] % head_dim:
        raise ValueError(
            f"pages have {pages[0].shape[3]} heads of {head_dim} elements, hidden rows of {dim}, and the first layer's weights "
            f"the packed shapes {tuple(layers[0].qkv.shape)} and {tuple(layers[0].out.shape)}: they do not fit"
        )
    if cos.shape != sin.shape or len(cos) != tokens or cos.shape[1] > head_dim or cos.shape[1] % 2:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected ({tokens}, R ≤ {head_dim})"
        )
    if any(len(level.query_positions) != tokens for level in levels if level.rows is None) or slots.shape != (tokens,):
        raise ValueError(f"levels and slots ({tuple(slots.shape)}) must be of the {tokens} tokens of hidden")
    for name, x in (("hidden", hidden), ("cos", cos), ("sin", sin), ("pages", pages[0])):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"{name} is {x.dtype} on {x.device}: expected float32 on the CPU")
    # Here, so that what counts PyTorch's memory sees it.
    inner = layers[0].down.shape[1]
    queries = layers[0].out.shape[1]
    per_token = 2 * queries + 2 * pages[0].shape[3] * head_dim
    scratch = torch.empty(tokens * per_token + min(tokens, _ROWS_IN_FLIGHT) * inner)
    out: Tensor = torch.ops.alignpro.decoder_stack.default(
        hidden,
        *weights.tensors,
        cos.contiguous(),
        sin.contiguous(),
        pages,
        slots,
        [level.rows for level in levels],
        [level.cu_queries for level in levels],
        [level.page_table for level in levels],
        [level.key_lengths for level in levels],
        [level.query_positions for level in levels],
        [level.key_starts for level in levels],
        weights.eps,
        weights.offset,
        weights.scale,
        weights.softcap or 0.0,
        [layer.window or 0 for layer in layers],
        scratch,
    )
    return out


def _register_fake() -> None:
    """Shapes of the result, for tracing."""

    @torch.library.register_fake("alignpro::decoder_stack")
    def _(hidden, *rest):  # type: ignore[no-untyped-def]
        return torch.empty_like(hidden)
