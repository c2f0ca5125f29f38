"""Decoders with random weights, LoRAs on them, and their states by plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from alignpro_kernels import PagedKeys
from alignpro_kernels.decoder import (
    PROJECTIONS,
    DecoderLayer,
    DecoderLoRA,
    DecoderWeights,
    ProjectionLoRA,
    decoder_stack,
)
from alignpro_kernels.linear import pack_weight


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@dataclass(frozen=True)
class Decoder:
    """A decoder of given sizes with random weights."""

    dim: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 10
    inner: int = 37
    layers: int = 2
    rotary: int = 10
    bias: bool = False
    all_biases: bool = False
    head_norms: bool = False
    offset: float = 0.0
    softcap: float | None = None
    window: int | None = None

    def plain(self) -> list[dict[str, Tensor]]:
        """Return the weights of each layer, (outputs, inputs) each."""
        torch.manual_seed(0)
        width = self.heads * self.head_dim

        def matrix(outputs: int, inputs: int) -> Tensor:
            return torch.randn(outputs, inputs) / inputs**0.5

        return [
            {
                "attention_norm": torch.randn(self.dim),
                "qkv": matrix(width + 2 * self.kv_heads * self.head_dim, self.dim),
                "out": matrix(self.dim, width),
                "mlp_norm": torch.randn(self.dim),
                "gate": matrix(self.inner, self.dim),
                "up": matrix(self.inner, self.dim),
                "down": matrix(self.dim, self.inner),
                "qkv_bias": torch.randn(width + 2 * self.kv_heads * self.head_dim),
                "query_norm": torch.randn(self.head_dim),
                "key_norm": torch.randn(self.head_dim),
                "out_bias": torch.randn(self.dim),
                "gate_bias": torch.randn(self.inner),
                "up_bias": torch.randn(self.inner),
                "down_bias": torch.randn(self.dim),
            }
            for _ in range(self.layers)
        ]

    def packed(self, *stored: torch.dtype) -> DecoderWeights:
        """Return the packed weights; matrices go through the given dtypes in turn, and are stored in the last one."""
        layers = []
        for weights in self.plain():
            packed = {name: pack_weight(_through(x, *stored)) if x.ndim == 2 else x for name, x in weights.items()}
            layer = DecoderLayer(**packed, window=self.window)
            if not self.bias:
                layer = replace(layer, qkv_bias=None)
            if not self.all_biases:
                layer = replace(layer, out_bias=None, gate_bias=None, up_bias=None, down_bias=None)
            if not self.head_norms:
                layer = replace(layer, query_norm=None, key_norm=None)
            layers.append(layer)
        return DecoderWeights(layers, self.last_norm(), 1e-6, self.offset, self.head_dim**-0.5, self.softcap)

    @property
    def outputs(self) -> dict[str, int]:
        """Number of outputs of each projection."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return dict(zip(PROJECTIONS, (queries, keys, keys, self.dim, self.inner, self.inner, self.dim), strict=True))

    def loras(self, seed: int = 2) -> list[ProjectionLoRA]:
        """LoRAs of different ranks on most projections; two on the first one of the first layer."""
        generator = torch.Generator().manual_seed(seed)
        inputs = dict.fromkeys(PROJECTIONS, self.dim) | {"out": self.outputs["query"], "down": self.inner}
        places = [
            (0, 0),
            *((layer, p) for layer in range(self.layers) for p in range(7) if layer == 0 or p not in (1, 4)),
        ]
        return [
            ProjectionLoRA(
                layer,
                p,
                torch.randn(rank := 1 + 3 * p, inputs[PROJECTIONS[p]], generator=generator),
                torch.randn(self.outputs[PROJECTIONS[p]], rank, generator=generator),
                0.1 + 0.02 * p,
            )
            for layer, p in places
        ]

    def last_norm(self) -> Tensor:
        return torch.linspace(0.5, 2, self.dim)

    def exact(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        dtype: torch.dtype = torch.float64,
        lora: DecoderLoRA | None = None,
    ) -> Tensor:
        """Compute one sequence by plain PyTorch; returns the states (T, D)."""
        x, cos, sin = (y.to(dtype) for y in (hidden, cos, sin))

        def norm(y: Tensor, weight: Tensor) -> Tensor:
            return y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (weight.to(dtype) + self.offset)

        def rotate(y: Tensor) -> Tensor:  # (heads, T, head_dim)
            a, b = y[..., : self.rotary].chunk(2, -1)
            return torch.cat([y[..., : self.rotary] * cos + torch.cat([-b, a], -1) * sin, y[..., self.rotary :]], -1)

        def added(y: Tensor, layer: int, name: str) -> Tensor:
            """What LoRAs add to the outputs of a projection."""
            out = torch.zeros(len(y), self.outputs[name], dtype=dtype)
            for each in lora.projections if lora is not None else ():
                if (each.layer, PROJECTIONS[each.projection]) == (layer, name):
                    out += acts[:, None] * each.scale * (y @ each.a.to(dtype).T @ each.b.to(dtype).T)
            return out

        acts = torch.ones(len(x), dtype=dtype)
        if lora is not None and lora.rows is not None:
            acts = torch.zeros(len(x), dtype=dtype).index_fill(0, lora.rows, 1)
        span = torch.arange(len(x))
        distance = span[:, None] - span
        seen = (distance >= 0) & (distance < (self.window or 1 << 30))
        for layer, weights in enumerate(self.plain()):
            w = {name: y.to(dtype) for name, y in weights.items()}
            bias = {name: w[f"{name}_bias"] if self.all_biases else 0 for name in ("out", "gate", "up", "down")}
            h = norm(x, w["attention_norm"])
            qkv = (
                h @ w["qkv"].T
                + (w["qkv_bias"] if self.bias else 0)
                + torch.cat([added(h, layer, name) for name in PROJECTIONS[:3]], -1)
            )
            heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads])
            if self.head_norms:
                q, k = norm(q, w["query_norm"]), norm(k, w["key_norm"])
            q, k = rotate(q), rotate(k)
            k, v = (y.repeat_interleave(self.heads // self.kv_heads, 0) for y in (k, v))
            scores = q @ k.mT * self.head_dim**-0.5
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
            out = out.transpose(0, 1).flatten(1)
            x = x + out @ w["out"].T + bias["out"] + added(out, layer, "out")
            h = norm(x, w["mlp_norm"])
            gate = h @ w["gate"].T + bias["gate"] + added(h, layer, "gate")
            inner = functional.silu(gate) * (h @ w["up"].T + bias["up"] + added(h, layer, "up"))
            x = x + inner @ w["down"].T + bias["down"] + added(inner, layer, "down")
        return norm(x, self.last_norm())


def _through(weight: Tensor, *dtypes: torch.dtype) -> Tensor:
    for dtype in dtypes:
        weight = weight.to(dtype)
    return weight


class Sequence:
    """A sequence that is computed in chunks over its own pages."""

    def __init__(self, decoder: Decoder, tokens: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.decoder, self.tokens = decoder, tokens
        self.hidden = torch.randn(tokens, decoder.dim, generator=generator)
        angles = torch.rand(tokens, decoder.rotary, generator=generator) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        self.page = 4
        count = -(-tokens // self.page)
        self.table = torch.arange(count, dtype=torch.int32).flip(0)
        self.pages = [
            torch.full((count, 2, self.page, decoder.kv_heads, decoder.head_dim), torch.nan)
            for _ in range(decoder.layers)
        ]

    def level(self, first: int, last: int) -> PagedKeys:
        def int32(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        positions = torch.arange(first, last, dtype=torch.int32)
        return PagedKeys(int32(0, last - first), self.table[None], int32(last), positions, int32(0))

    def run(self, weights: DecoderWeights, first: int, last: int, lora: DecoderLoRA | None = None) -> Tensor:
        at = torch.arange(first, last)
        slots = self.table.long()[at // self.page] * self.page + at % self.page
        return decoder_stack(
            self.hidden[at], weights, self.cos[at], self.sin[at], self.pages, slots, [self.level(first, last)], lora
        )


DECODERS = {
    "plain": Decoder(),
    "bias": Decoder(bias=True),
    "biases everywhere": Decoder(bias=True, all_biases=True),
    "norms of heads": Decoder(head_norms=True, head_dim=16, rotary=16),
    "window and soft-cap": Decoder(window=3, softcap=2.0),
    "norms around one": Decoder(offset=1.0),
    "partial rotary": Decoder(rotary=6),
    "one head, wide": Decoder(dim=64, heads=1, kv_heads=1, head_dim=72, rotary=72, inner=130),
}
