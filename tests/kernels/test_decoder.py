"""Products with packed weights, and a whole decoder in one call, compared with plain PyTorch in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from decoder_problems import DECODERS, Decoder, Sequence, error
from fewer_instructions import FEWER, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from alignpro_kernels import backends, cpp_library
from alignpro_kernels.decoder import decoder_stack
from alignpro_kernels.linear import pack_weight, packed_gate, packed_linear

needs_cpp = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")
pytestmark = needs_cpp


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
    for weight in (torch.zeros(3), torch.zeros(3, 4, dtype=torch.float16), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match="expected \\(N, K\\) float32"):
            pack_weight(weight)
    packed = pack_weight(torch.zeros(40, 6))
    with pytest.raises(ValueError, match="bias is"):
        packed_linear(torch.zeros(3, 6), packed, 40, torch.zeros(41))
    with pytest.raises(ValueError, match="up is"):
        packed_gate(torch.zeros(3, 6), packed, pack_weight(torch.zeros(80, 6)), 40)


def test_shapes_can_be_traced() -> None:
    assert cpp_library.unavailable() is None
    with FakeTensorMode() as mode:
        x, weight = (mode.from_tensor(y) for y in (torch.zeros(2, 3, 6), torch.zeros(40, 6)))
        packed = torch.ops.alignpro.pack_weight(weight)
        assert packed.shape == pack_weight(torch.zeros(40, 6)).shape
        assert torch.ops.alignpro.packed_linear(x, packed, None, 40).shape == (2, 3, 40)
        assert torch.ops.alignpro.packed_gate(x, packed, packed, 40).shape == (2, 3, 40)


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


def test_threads_that_lose_their_cores(set_threads: Callable[[int], None]) -> None:
    """With more threads than cores some come late to every step, or hold what others wait for."""
    decoder = Decoder(dim=128, heads=4, kv_heads=2, head_dim=32, inner=256, rotary=32, layers=6)
    weights = decoder.packed()
    alone = Sequence(decoder, 60).run(weights, 0, 60)
    set_threads(12)
    for _ in range(20):
        assert torch.equal(Sequence(decoder, 60).run(weights, 0, 60), alone)


def test_packed_weights_share_large_pages_without_sharing_a_storage() -> None:
    weights = [torch.randn(64, 96) for _ in range(5)]
    packed = [pack_weight(weight) for weight in weights]
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in packed)
    assert all(each.data_ptr() % 64 == 0 for each in packed)
    del packed[::2]
    gc.collect()
    again = [pack_weight(weight) for weight in weights[::2]]
    for weight, each in zip([weights[1], weights[3], *weights[::2]], [*packed, *again], strict=True):
        assert torch.equal(packed_linear(torch.eye(96), each, 64), weight.T)


def test_packed_weights_are_freed() -> None:
    """Those of a backward pass are packed for one product; the next ones take their memory."""
    weight = torch.randn(512, 1024)  # 2 MiB
    kept = pack_weight(weight)
    addresses = {pack_weight(weight).data_ptr() for _ in range(200)}
    assert len(addresses) <= 40
    assert kept.data_ptr() not in addresses


def test_no_tokens() -> None:
    decoder = Decoder()
    sequence = Sequence(decoder, 5)
    assert sequence.run(decoder.packed(), 0, 0).shape == (0, decoder.dim)
    assert all(pages.isnan().all() for pages in sequence.pages)


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


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gate", Decoder(inner=70)),
        ("down", Decoder(inner=70)),
        ("out", Decoder(heads=6)),
        ("qkv", Decoder(heads=6)),
        ("out_bias", Decoder(dim=40)),
        ("mlp_norm", Decoder(dim=40)),
        ("query_norm", Decoder(head_dim=12)),
        ("gate_bias", None),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_weights_that_do_not_match_are_named_before_any_is_read(name: str, other: Decoder | None, layer: int) -> None:
    decoder = Decoder(bias=True, all_biases=True, head_norms=True)
    weights = decoder.packed()
    wrong = None
    if other is not None:
        wrong = getattr(replace(other, bias=True, all_biases=True, head_norms=True).packed().layers[0], name)
    layers = list(weights.layers)
    layers[layer] = replace(layers[layer], **{name: wrong})
    sequence = Sequence(decoder, 4)
    with pytest.raises(ValueError, match=r"weights: \w+ of layer|packed weights have shapes"):
        sequence.run(replace(weights, layers=layers), 0, 4)
    assert all(pages.isnan().all() for pages in sequence.pages)


@pytest.mark.parametrize("name", ["qkv_bias", "query_norm", "key_norm"])
def test_weights_that_do_not_match_the_pages_are_named(name: str) -> None:
    decoder = Decoder(bias=True, head_norms=True)
    weights = decoder.packed()
    layers = [replace(layer, **{name: torch.ones(7)}) for layer in weights.layers]
    with pytest.raises(ValueError, match=rf"weights: {name} has shape \(7,\)"):
        Sequence(decoder, 4).run(replace(weights, layers=layers), 0, 4)


def test_pages_that_differ_are_named() -> None:
    decoder = Decoder()
    sequence = Sequence(decoder, 4)
    sequence.pages[1] = sequence.pages[1][..., :1, :].clone()
    with pytest.raises(ValueError, match="pages differ from layer to layer"):
        sequence.run(decoder.packed(), 0, 4)


def test_torchs_defaults_do_not_matter() -> None:
    decoder = Decoder()
    weights, expected = decoder.packed(), Sequence(decoder, 4).run(decoder.packed(), 0, 4)
    sequence = Sequence(decoder, 4)
    level, slots = sequence.level(0, 4), sequence.table.long().repeat_interleave(4)[:4] * 4 + torch.arange(4)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = decoder_stack(sequence.hidden, weights, sequence.cos, sequence.sin, sequence.pages, slots, [level])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.slow
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
