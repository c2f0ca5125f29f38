"""Products with packed weights, and a whole decoder in one call, compared with plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from fewer_instructions import FEWER, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from alignpro_kernels import PagedKeys, backends, cpp_library
from alignpro_kernels.decoder import DecoderLayer, DecoderWeights, decoder_stack
from alignpro_kernels.linear import pack_weight, packed_gate, packed_linear

needs_cpp = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")
pytestmark = needs_cpp


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(0, 120), inputs=st.integers(1, 450), outputs=st.integers(1, 100), bias=st.booleans())
def test_products_of_any_shape(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows + inputs)
    x, weight, b = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs) if bias else None
    found = packed_linear(x, pack_weight(weight), outputs, b)
    exact = functional.linear(x.double(), weight.double(), b if b is None else b.double())
    plain = functional.linear(x, weight, b)
    assert found.shape == exact.shape
    if rows:
        assert error(found, exact) <= 4 * error(plain, exact) + 1e-6


def test_products_of_many_rows() -> None:
    """Several groups of rows, and several chunks of inputs."""
    x, weight = torch.randn(2, 700, 513), torch.randn(70, 513)
    exact = x.double() @ weight.double().T
    assert error(packed_linear(x, pack_weight(weight), 70), exact) <= 2 * error(x @ weight.T, exact) + 1e-6


def test_a_transposed_weight_is_packed_like_its_copy() -> None:
    weight = torch.randn(37, 45)
    assert torch.equal(pack_weight(weight.T), pack_weight(weight.T.contiguous()))
    assert torch.equal(pack_weight(weight[:, :1]), pack_weight(weight[:, :1].contiguous()))


def test_a_gated_product() -> None:
    x, gate, up = torch.randn(33, 40), torch.randn(50, 40), 10 * torch.randn(50, 40)
    exact = functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    found = packed_gate(x, pack_weight(gate), pack_weight(up), 50)
    assert error(found, exact) < 1e-6
    wide = packed_gate(
        torch.eye(1), pack_weight(torch.tensor([[-1e4], [1e4], [torch.nan]])), pack_weight(torch.ones(3, 1)), 3
    )
    assert -1e-30 < wide[0, 0] <= 0 and wide[0, 1] == 1e4 and wide[0, 2].isnan()


@pytest.mark.parametrize("inputs", [64, 400])
def test_a_row_does_not_depend_on_the_others(inputs: int, set_threads: Callable[[int], None]) -> None:
    """Each row gives the same bits with any other rows and any number of threads."""
    x, weight = torch.randn(300, inputs), torch.randn(96, inputs)
    packed = pack_weight(weight)
    whole = packed_linear(x, packed, 96)
    for count in (1, 5, 12, 13, 64, 97):
        assert torch.equal(packed_linear(x[:count], packed, 96), whole[:count])
    set_threads(3)
    assert torch.equal(packed_linear(x, packed, 96), whole)
    set_threads(1)
    x[7] = torch.nan
    found = packed_linear(x, packed, 96)
    assert found[7].isnan().all() and torch.equal(found[8:], whole[8:]) and torch.equal(found[:7], whole[:7])


@pytest.mark.parametrize(
    ("x", "outputs", "named"),
    [
        (torch.zeros(3, 5), 40, "x has shape"),
        (torch.zeros(3, 6), 33, "x has shape"),
        (torch.zeros(3, 6, dtype=torch.float64), 40, "float64"),
    ],
)
def test_mismatched_shapes_are_named(x: Tensor, outputs: int, named: str) -> None:
    packed = pack_weight(torch.zeros(72, 6))
    with pytest.raises(ValueError, match=named):
        packed_linear(x, packed, outputs)
    with pytest.raises(ValueError, match=named):
        packed_gate(x, packed, packed, outputs)


def test_weights_that_cannot_be_packed_are_named() -> None:
    for weight in (torch.zeros(3), torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="expected \\(N, K\\) float32"):
            pack_weight(weight)
    packed = pack_weight(torch.zeros(40, 6))
    with pytest.raises(ValueError, match="bias is"):
        packed_linear(torch.zeros(3, 6), packed, 40, torch.zeros(41))
    with pytest.raises(ValueError, match="up has"):
        packed_gate(torch.zeros(3, 6), packed, pack_weight(torch.zeros(80, 6)), 40)


def test_shapes_can_be_traced() -> None:
    assert cpp_library.unavailable() is None
    with FakeTensorMode() as mode:
        x, weight = (mode.from_tensor(y) for y in (torch.zeros(2, 3, 6), torch.zeros(40, 6)))
        packed = torch.ops.alignpro.pack_weight(weight)
        assert packed.shape == pack_weight(torch.zeros(40, 6)).shape
        assert torch.ops.alignpro.packed_linear(x, packed, None, 40).shape == (2, 3, 40)
        assert torch.ops.alignpro.packed_gate(x, packed, packed, 40).shape == (2, 3, 40)


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
            }
            for _ in range(self.layers)
        ]

    def packed(self) -> DecoderWeights:
        layers = []
        for weights in self.plain():
            packed = {name: pack_weight(x) if x.ndim == 2 else x for name, x in weights.items()}
            layer = DecoderLayer(**packed, window=self.window)
            if not self.bias:
                layer = replace(layer, qkv_bias=None)
            if not self.head_norms:
                layer = replace(layer, query_norm=None, key_norm=None)
            layers.append(layer)
        return DecoderWeights(layers, self.last_norm(), 1e-6, self.offset, self.head_dim**-0.5, self.softcap)

    def last_norm(self) -> Tensor:
        return torch.linspace(0.5, 2, self.dim)

    def exact(self, hidden: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Compute one sequence by plain PyTorch; returns the states (T, D)."""
        x, cos, sin = (y.to(dtype) for y in (hidden, cos, sin))

        def norm(y: Tensor, weight: Tensor) -> Tensor:
            return y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (weight.to(dtype) + self.offset)

        def rotate(y: Tensor) -> Tensor:  # (heads, T, head_dim)
            a, b = y[..., : self.rotary].chunk(2, -1)
            return torch.cat([y[..., : self.rotary] * cos + torch.cat([-b, a], -1) * sin, y[..., self.rotary :]], -1)

        span = torch.arange(len(x))
        distance = span[:, None] - span
        seen = (distance >= 0) & (distance < (self.window or 1 << 30))
        for weights in self.plain():
            w = {name: y.to(dtype) for name, y in weights.items()}
            qkv = norm(x, w["attention_norm"]) @ w["qkv"].T + (w["qkv_bias"] if self.bias else 0)
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
            x = x + out.transpose(0, 1).flatten(1) @ w["out"].T
            h = norm(x, w["mlp_norm"])
            x = x + (functional.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
        return norm(x, self.last_norm())


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

    def run(self, weights: DecoderWeights, first: int, last: int) -> Tensor:
        at = torch.arange(first, last)
        slots = self.table.long()[at // self.page] * self.page + at % self.page
        return decoder_stack(
            self.hidden[at], weights, self.cos[at], self.sin[at], self.pages, slots, [self.level(first, last)]
        )


DECODERS = {
    "plain": Decoder(),
    "bias": Decoder(bias=True),
    "norms of heads": Decoder(head_norms=True, head_dim=16, rotary=16),
    "window and soft-cap": Decoder(window=3, softcap=2.0),
    "norms around one": Decoder(offset=1.0),
    "partial rotary": Decoder(rotary=6),
    "one head, wide": Decoder(dim=64, heads=1, kv_heads=1, head_dim=72, rotary=72, inner=130),
}


@pytest.mark.parametrize("name", DECODERS)
def test_states_equal_those_of_plain_layers(name: str) -> None:
    decoder = DECODERS[name]
    sequence = Sequence(decoder, 19)
    found = sequence.run(decoder.packed(), 0, 19)
    exact = decoder.exact(sequence.hidden, sequence.cos, sequence.sin)
    plain = decoder.exact(sequence.hidden, sequence.cos, sequence.sin, torch.float32)
    assert error(found, exact) <= 4 * error(plain, exact) + 1e-6


def test_chunks_of_a_sequence_give_the_whole() -> None:
    """Prefill in chunks and then token by token gives the same bits."""
    decoder = DECODERS["bias"]
    weights = decoder.packed()
    whole = Sequence(decoder, 19).run(weights, 0, 19)
    sequence = Sequence(decoder, 19)
    pieces = [sequence.run(weights, first, last) for first, last in ((0, 7), (7, 15), (15, 16), (16, 17), (17, 19))]
    assert torch.equal(torch.cat(pieces), whole)


def test_many_tokens_and_threads(set_threads: Callable[[int], None]) -> None:
    """There are more rows than a gated layer processes at a time."""
    decoder = Decoder(layers=1)
    weights = decoder.packed()
    sequence = Sequence(decoder, 600)
    found = sequence.run(weights, 0, 600)
    assert error(found, decoder.exact(sequence.hidden, sequence.cos, sequence.sin)) < 1e-5
    set_threads(3)
    assert torch.equal(Sequence(decoder, 600).run(weights, 0, 600), found)


def test_padding_is_not_written() -> None:
    """Padding has slot −1 and a query that attends to nothing."""
    decoder = Decoder()
    sequence = Sequence(decoder, 5)
    before = [pages.clone() for pages in sequence.pages]
    level = replace(sequence.level(0, 5), query_positions=torch.full((5,), -1, dtype=torch.int32))
    slots = torch.full((5,), -1)
    out = decoder_stack(sequence.hidden, decoder.packed(), sequence.cos, sequence.sin, sequence.pages, slots, [level])
    assert out.isfinite().all()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(sequence.pages, before, strict=True))


def test_the_shape_of_the_stack_can_be_traced() -> None:
    assert cpp_library.unavailable() is None
    decoder = Decoder()
    sequence, weights = Sequence(decoder, 5), decoder.packed()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert sequence.run(weights, 0, 5).shape == (5, decoder.dim)
    assert all(pages.isnan().all() for pages in sequence.pages)


@pytest.mark.parametrize("name", ["pages", "cos", "slots", "hidden", "weights"])
def test_mismatched_arguments_are_named(name: str) -> None:
    decoder = Decoder()
    sequence = Sequence(decoder, 4)
    arguments = {
        "hidden": sequence.hidden,
        "weights": decoder.packed(),
        "cos": sequence.cos,
        "sin": sequence.sin,
        "pages": sequence.pages,
        "slots": torch.arange(4),
        "levels": [sequence.level(0, 4)],
    }
    arguments[name] = {
        "pages": sequence.pages[:1],
        "cos": sequence.cos[:3],
        "slots": torch.arange(3),
        "hidden": sequence.hidden.double(),
        "weights": Decoder(dim=32).packed(),
    }[name]
    with pytest.raises(ValueError, match=name):
        decoder_stack(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("instructions", FEWER)
def test_the_same_holds_with_fewer_instructions(instructions: str) -> None:
    names = (
        "test_products_of_any_shape",
        "test_products_of_many_rows",
        "test_a_gated_product",
        "test_a_row_does_not_depend_on_the_others",
        "test_states_equal_those_of_plain_layers",
        "test_chunks_of_a_sequence_give_the_whole",
    )
    run_with(instructions, *(f"{__file__}::{name}" for name in names))
