"""Weights in bfloat16 with float32 states: the bits of the same weights in float32, and the reference in float64."""

from __future__ import annotations

import pytest
import torch
from decoder_problems import Decoder, Sequence
from fast_backends import FAST, OPERATORS
from fewer_instructions import FEWER, run_with, splits_states
from head_problems import Problem, run
from torch import Tensor

from alignpro_kernels import LoRA, backends, linear_logprob, linear_sample
from alignpro_kernels.linear import pack_weight, packed_gate, packed_linear

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")
of_widened = pytest.mark.skipif(splits_states(), reason="runs with avx512, below: by AMX, states are split")
SHAPES = [(33, 24), (96, 160), (70, 576)]
"""Outputs and inputs: partial panels, and several chunks of inputs of different lengths."""


def narrow(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@of_widened
@pytest.mark.parametrize("rows", [1, 2, 7, 40, 300])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_have_the_bits_of_float32(rows: int, outputs: int, inputs: int) -> None:
    weight, x, bias = narrow(outputs, inputs), torch.randn(rows, inputs), torch.randn(outputs)
    found = packed_linear(x, pack_weight(weight), outputs, bias)
    assert torch.equal(found, packed_linear(x, pack_weight(weight.float()), outputs, bias))
    exact = x.double() @ weight.double().T + bias.double()
    assert (found - exact).abs().max() <= 2e-6 * exact.abs().max()
    up = narrow(outputs, inputs + 2)[:, 2:]
    gated = packed_gate(x, pack_weight(weight), pack_weight(up), outputs)
    assert torch.equal(gated, packed_gate(x, pack_weight(weight.float()), pack_weight(up.float()), outputs))


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_row_does_not_depend_on_the_others(outputs: int, inputs: int) -> None:
    packed, x = pack_weight(narrow(outputs, inputs)), torch.randn(50, inputs)
    together = packed_linear(x, packed, outputs)
    for i in (0, 13, 49):
        assert torch.equal(packed_linear(x[i : i + 1], packed, outputs)[0], together[i])


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_transposed_weight_is_packed_like_its_copy(outputs: int, inputs: int) -> None:
    weight = narrow(inputs, outputs + outputs % 2).T
    assert not weight.is_contiguous()
    assert torch.equal(pack_weight(weight.T[: inputs // 2 * 2].T), pack_weight(weight.contiguous()))


def test_an_odd_number_of_inputs_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"weight is torch.bfloat16 of shape \(4, 7\) on cpu: .*bfloat16 with an even K"
    ):
        pack_weight(narrow(4, 7))
    with pytest.raises(ValueError, match=r"up is torch.float32 .* and gate torch.bfloat16"):
        packed_gate(torch.randn(1, 8), pack_weight(narrow(4, 8)), pack_weight(narrow(4, 8).float()), 4)


@of_widened
def test_a_decoder_has_the_bits_of_float32() -> None:
    decoder = Decoder(dim=64, heads=4, kv_heads=2, head_dim=16, inner=96, rotary=16, all_biases=True, bias=True)
    narrow, wide = decoder.packed(torch.bfloat16), decoder.packed(torch.bfloat16, torch.float32)
    assert narrow.layers[0].gate.dtype == torch.bfloat16
    whole = Sequence(decoder, 23).run(narrow, 0, 23)
    assert torch.equal(whole, Sequence(decoder, 23).run(wide, 0, 23))
    parts = Sequence(decoder, 23)
    assert torch.equal(
        torch.cat([parts.run(narrow, first, last) for first, last in ((0, 16), (16, 17), (17, 23))]), whole
    )


@pytest.mark.parametrize("rows", [1, 3, 20, 60])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_head_in_bfloat16_takes_float32_states(operator: str, backend: str, rows: int) -> None:
    problem = Problem(rows=rows, bias=True, rank=4, reference="separate", softcap=3.0, temperatures=True)
    exact = run(problem, operator, "reference", torch.float64)
    found = run(problem, operator, backend, torch.float32, weights=torch.bfloat16)
    of_weights = {name for name in found.values if "weight" in name or "bias" in name}
    for name, error in found.errors(exact).items():
        assert error < (5e-3 if name in of_weights else 3e-5), name  # whose gradients are rounded to bfloat16


@of_widened
@pytest.mark.parametrize("rows", [1, 3, 20, 60])
def test_samples_are_those_of_the_head_in_float32(rows: int) -> None:
    weight, hidden, seeds = narrow(1001, 96), torch.randn(rows, 96), torch.arange(rows)
    found, expected = linear_sample(hidden, weight, seeds=seeds), linear_sample(hidden, weight.float(), seeds=seeds)
    assert torch.equal(found.token, expected.token)
    assert (found.logprob - expected.logprob).abs().max() < 3e-5
    again = linear_logprob(hidden, weight, found.token).logprob
    assert (found.logprob - again).abs().max() < 3e-5


def test_dtypes_that_are_not_widened_are_refused() -> None:
    weight, target = narrow(9, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"weight is torch.float32 and hidden is torch.bfloat16"):
        linear_logprob(narrow(3, 8), weight.float(), target)
    lora = LoRA(narrow(2, 8), narrow(9, 2), 1.0)
    with pytest.raises(ValueError, match=r"lora: a is torch.bfloat16 .* hidden is torch.float32"):
        linear_logprob(torch.randn(3, 8), weight, target, lora=lora)


@pytest.mark.parametrize(
    "instructions", [each if each == "avx512" else pytest.param(each, marks=pytest.mark.slow) for each in FEWER]
)
def test_older_instruction_sets(instructions: str) -> None:
    run_with(instructions, __file__, "-m", "not slow")
