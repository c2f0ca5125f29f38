"""All layers of a decoder in one call, on a CPU: csrc/cpu/decoder.cpp.

A decoder layer takes about thirty PyTorch operations. A decode step calls them with a few rows each, for which the
dispatch overhead is as large as the computation. Here a step is a single call, which also avoids writing intermediate
results only to read them again: matrix products are added to the residual stream directly, gates are applied while they
are in the cache, and keys and values are written to the pool as soon as they are rotated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignpro_kernels.linear import PANEL
from alignpro_kernels.paged_keys import PagedKeys, by_field

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
"""The projections of a layer, each of which may have LoRAs."""
_MAX_MLP_ROWS = 512
"""Maximum number of tokens whose intermediate MLP activations exist at the same time."""


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer on the CPU: matrices packed by `pack_weight`, in float32 or bfloat16; the others float32.

    h = x + out(attention(rotate(qkv(norm(x)))))        x' = h + down(silu(gate(norm'(h))) · up(norm'(h)))
    """

    attention_norm: Tensor
    """(D,)"""
    qkv: Tensor
    """Queries, keys and values, concatenated: (H + 2 H') head_dim outputs, D inputs."""
    out: Tensor
    """D outputs, H head_dim inputs."""
    mlp_norm: Tensor
    """(D,)"""
    gate: Tensor
    """I outputs, D inputs."""
    up: Tensor
    """Same shape as ``gate``."""
    down: Tensor
    """D outputs, I inputs."""
    qkv_bias: Tensor | None = None
    """((H + 2 H') head_dim,)"""
    query_norm: Tensor | None = None
    """(head_dim,): weight of the norm applied to each query before its rotation."""
    key_norm: Tensor | None = None
    """(head_dim,): likewise for each key."""
    out_bias: Tensor | None = None
    """(D,)"""
    gate_bias: Tensor | None = None
    """(I,)"""
    up_bias: Tensor | None = None
    """(I,)"""
    down_bias: Tensor | None = None
    """(D,)"""
    window: int | None = None
    """Number of positions that a query sees, including its own; None for all up to its own."""


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of all layers, and the constants that they share."""

    layers: Sequence[DecoderLayer]
    norm: Tensor
    """(D,): weight of the norm after the last layer."""
    eps: float
    """ε of the norms: x / √(mean(x²) + ε) · (weight + offset)."""
    offset: float
    scale: float
    """Scale of the attention scores."""
    softcap: float | None
    """Scores become softcap · tanh(score / softcap)."""

    @functools.cached_property
    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Norms, matrices and optional weights, in the operator's order.

        Raises:
            ValueError: Their shapes differ from layer to layer, or do not match one another.
        """
        layers = self.layers
        self._check_shapes()
        norms = [weight for layer in layers for weight in (layer.attention_norm, layer.mlp_norm)] + [self.norm]
        matrices = [m for layer in layers for m in (layer.qkv, layer.out, layer.gate, layer.up, layer.down)]
        optional = [x for layer in layers for x in _optional(layer)]
        return norms, matrices, optional

    def _check_shapes(self) -> None:
        """Check them once: the operator takes the sizes of the first layer for all, and reads weights without bounds."""
        first = self.layers[0]
        dim, queries, inner = len(self.norm), first.out.shape[1], first.down.shape[1]
        of_states, of_inner = -(-dim // PANEL), -(-inner // PANEL)
        given = {name: x.shape for name, x in vars(first).items() if isinstance(x, Tensor)}
        matching = {
            "attention_norm": (dim,),
            "qkv": (first.qkv.shape[0], dim, PANEL),
            "out": (of_states, queries, PANEL),
            "mlp_norm": (dim,),
            "gate": (of_inner, dim, PANEL),
            "up": (of_inner, dim, PANEL),
            "down": (of_states, inner, PANEL),
        }
        biases = {"out_bias": (dim,), "gate_bias": (inner,), "up_bias": (inner,), "down_bias": (dim,)}
        expected = given | matching | {name: shape for name, shape in biases.items() if name in given}
        for index, layer in enumerate(self.layers):
            found = {name: x.shape for name, x in vars(layer).items() if isinstance(x, Tensor)}
            for name in sorted(expected.keys() | found.keys()):
                if found.get(name) != expected.get(name):
                    raise ValueError(
                        f"weights: {name} of layer {index} has shape {_shape(found.get(name))}: expected "
                        f"{_shape(expected.get(name))}, by the last norm and the other weights of the first layer"
                    )


def _shape(x: Sequence[int] | None) -> str:
    return "none" if x is None else str(tuple(x))


def _optional(layer: DecoderLayer) -> tuple[Tensor | None, ...]:
    biases = layer.out_bias, layer.gate_bias, layer.up_bias, layer.down_bias
    return layer.qkv_bias, layer.query_norm, layer.key_norm, *biases


class ProjectionLoRA(NamedTuple):
    """A LoRA on a projection of a layer, whose weight becomes W + scale · B A; several on one projection add up."""

    layer: int
    projection: int
    """Index into `PROJECTIONS`."""
    a: Tensor
    """(r, inputs) float32"""
    b: Tensor
    """(outputs, r) float32"""
    scale: float


@dataclass(frozen=True)
class DecoderLoRA:
    """LoRAs inside the layers, on all tokens of a pass or on some. Nothing is kept of the factors after a pass."""

    projections: Sequence[ProjectionLoRA]
    rows: Tensor | None = None
    """(A,) int64 on the CPU: the tokens on which they act, in any order; None for all."""

    @property
    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[float], list[int], Tensor | None]:
        """Factors, scales, places and rows, as the operator takes them."""
        each = self.projections
        places = [len(PROJECTIONS) * x.layer + x.projection for x in each]
        return [x.a for x in each], [x.b for x in each], [x.scale for x in each], places, self.rows


_NO_LORA = DecoderLoRA(())


@torch.no_grad()
def decoder_stack(
    hidden: Tensor,
    weights: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    pages: Sequence[Tensor],
    slots: Tensor,
    levels: Sequence[PagedKeys],
    lora: DecoderLoRA | None = None,
) -> Tensor:
    """Run T tokens through all layers, write their keys and values to the pages, and return the last hidden states.

    A token's result depends only on its own sequence: it has the same bits in any batch and with any number of threads.
    Tokens on which no LoRA acts have the bits that they have without LoRAs.

    Args:
        hidden: (T, D) float32 on the CPU: the tokens' embeddings.
        weights: The weights of the layers.
        cos: (T, R) float32: the rotary embedding of each token, whose pairs are R / 2 elements apart. R ≤ head_dim.
        sin: As ``cos``.
        pages: Each layer's view of the pool, see `write_kv`.
        slots: (T,) int64: where each token's keys and values are written; −1 skips the token.
        levels: The keys that each token sees, see `cascade_attention`.
        lora: LoRAs on projections of the layers.

    Returns:
        (T, D) float32, after the last norm.

    Raises:
        ValueError: Shapes or dtypes do not match.
    """
    tokens, dim = hidden.shape
    layers = weights.layers
    if len(pages) != len(layers):
        raise ValueError(f"pages has {len(pages)} layers and weights has {len(layers)}: they must agree")
    head_dim = pages[0].shape[-1]
    queries, keys = layers[0].out.shape[1], pages[0].shape[3] * head_dim
    width = (queries + 2 * keys + PANEL - 1) // PANEL
    if layers[0].qkv.shape[:2] != (width, dim) or queries % head_dim:
        raise ValueError(
            f"pages has {pages[0].shape[3]} heads of {head_dim} elements, hidden has rows of {dim}, and the first layer's "
            f"packed weights have shapes {tuple(layers[0].qkv.shape)} and {tuple(layers[0].out.shape)}: they do not match"
        )
    if any(layer.shape[1:] != pages[0].shape[1:] for layer in pages):
        raise ValueError(f"pages differ from layer to layer: {sorted({tuple(layer.shape[1:]) for layer in pages})}")
    norms, matrices, optional = weights.tensors
    for name, x, size in zip(
        ("qkv_bias", "query_norm", "key_norm"), optional, (queries + 2 * keys, head_dim, head_dim), strict=False
    ):
        if x is not None and x.shape != (size,):
            raise ValueError(f"weights: {name} has shape {tuple(x.shape)}: expected ({size},), by pages")
    if cos.shape != sin.shape or len(cos) != tokens or cos.shape[1] > head_dim or cos.shape[1] % 2:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected ({tokens}, R ≤ {head_dim})"
        )
    if any(len(level.query_positions) != tokens for level in levels if level.rows is None) or slots.shape != (tokens,):
        raise ValueError(f"levels and slots ({tuple(slots.shape)}) must be for the {tokens} tokens of hidden")
    for name, x in (("hidden", hidden), ("cos", cos), ("sin", sin), ("pages", pages[0])):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"{name} is {x.dtype} on {x.device}: expected float32 on the CPU")
    if not tokens:
        return hidden.clone()
    # Allocated here rather than in C++, so that tools that measure PyTorch's memory see it.
    inner = layers[0].down.shape[1]
    floats = tokens * 2 * (queries + keys) + min(tokens, _MAX_MLP_ROWS) * inner
    scratch = torch.empty(floats, dtype=torch.float32, device="cpu")
    out: Tensor = torch.ops.alignpro.decoder_stack.default(
        hidden,
        norms,
        matrices,
        optional,
        cos.contiguous(),
        sin.contiguous(),
        pages,
        slots,
        *by_field(levels),
        weights.eps,
        weights.offset,
        weights.scale,
        weights.softcap or 0.0,
        [layer.window or 0 for layer in layers],
        *(lora or _NO_LORA).arguments,
        scratch,
    )
    return out
