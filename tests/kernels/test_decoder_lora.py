"""LoRAs inside the decoder that runs in one call: equal to plain PyTorch in float64, and only where they act."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoder_problems import DECODERS, Decoder, Sequence, error
from fewer_instructions import FEWER, run_with
from torch import Tensor

from alignpro_kernels import backends
from alignpro_kernels.decoder import DecoderLoRA

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")

TOKENS = 19
ROWS = {
    "all": None,
    "from one on": torch.arange(7, TOKENS),
    "scattered": torch.tensor([9, 4, 5, 17]),
    "none": torch.arange(0),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", DECODERS)
def test_states_equal_those_of_plain_layers(name: str, rows: str) -> None:
    decoder, sequence = DECODERS[name], Sequence(DECODERS[name], TOKENS)
    lora = DecoderLoRA(decoder.loras(), ROWS[rows])
    inputs = sequence.hidden, sequence.cos, sequence.sin
    found = sequence.run(decoder.packed(), 0, TOKENS, lora)
    exact = decoder.exact(*inputs, lora=lora)
    assert (error(exact, decoder.exact(*inputs)) > 0.01) == (rows != "none")
    assert error(found, exact) <= 4 * error(decoder.exact(*inputs, torch.float32, lora), exact) + 1e-6


@pytest.mark.parametrize("name", ["plain", "biases everywhere"])
def test_other_tokens_keep_their_bits(name: str) -> None:
    """Tokens before the first active one have those of the base model, even if the LoRA's output is not finite."""
    decoder = DECODERS[name]
    base = Sequence(decoder, TOKENS).run(decoder.packed(), 0, TOKENS)
    for scale in (1.0, torch.inf):
        loras = [each._replace(scale=each.scale * scale) for each in decoder.loras()]
        found = Sequence(decoder, TOKENS).run(decoder.packed(), 0, TOKENS, DecoderLoRA(loras, ROWS["from one on"]))
        assert torch.equal(found[:7], base[:7])
        assert not (found[7:] == base[7:]).all(1).any()


def test_chunks_of_a_sequence_give_the_whole(set_threads: Callable[[int], None]) -> None:
    """A token has the same bits in any batch and with any number of threads."""
    decoder = DECODERS["bias"]
    loras, weights = decoder.loras(), decoder.packed()
    whole = Sequence(decoder, TOKENS).run(weights, 0, TOKENS, DecoderLoRA(loras, ROWS["from one on"]))
    sequence, pieces = Sequence(decoder, TOKENS), []
    for first, last in ((0, 4), (4, 15), (15, 16), (16, 17), (17, 19)):
        rows = torch.arange(first, last)[max(7 - first, 0) :] - first
        pieces.append(sequence.run(weights, first, last, DecoderLoRA(loras, rows)))
    assert torch.equal(torch.cat(pieces), whole)
    set_threads(3)
    again = Sequence(decoder, TOKENS).run(weights, 0, TOKENS, DecoderLoRA(loras, ROWS["from one on"]))
    assert torch.equal(again, whole)


def test_many_tokens_and_ranks() -> None:
    """There are more rows than an MLP processes at a time, and a LoRA of more than one chunk of its rank."""
    decoder = Decoder(layers=1)
    wide = [
        each._replace(a=torch.randn(200, each.a.shape[1]), b=torch.randn(len(each.b), 200) / 20)
        for each in decoder.loras()[-3:]
    ]
    lora = DecoderLoRA(wide, torch.arange(30, 580, 3))
    sequence = Sequence(decoder, 600)
    found = sequence.run(decoder.packed(), 0, 600, lora)
    exact = decoder.exact(sequence.hidden, sequence.cos, sequence.sin, lora=lora)
    plain = decoder.exact(sequence.hidden, sequence.cos, sequence.sin, torch.float32, lora)
    assert error(found, exact) <= 4 * error(plain, exact) + 1e-6


def test_changed_factors_act_at_once() -> None:
    decoder = Decoder()
    weights, loras = decoder.packed(), decoder.loras()
    before = Sequence(decoder, TOKENS).run(weights, 0, TOKENS, DecoderLoRA(loras))
    for each in loras:
        each.b.data.zero_()  # a change that PyTorch does not count
    after = Sequence(decoder, TOKENS).run(weights, 0, TOKENS, DecoderLoRA(loras))
    assert not torch.equal(after, before)
    assert torch.equal(after, Sequence(decoder, TOKENS).run(weights, 0, TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.zeros(1, 25)},
            r"factors of shapes \[1, 25\] and \[40, 1\] on a projection from 24 to 40 features",
        ),
        ({"b": torch.zeros(40, 2)}, "they do not match"),
        ({"a": torch.zeros(0, 24), "b": torch.zeros(40, 0)}, "they do not match"),
        ({"b": torch.zeros(40, 1, dtype=torch.float64)}, "a LoRA is Double"),
        ({"layer": 2}, "on layer 2 of 2"),
    ],
)
def test_loras_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    decoder = Decoder()
    lora = decoder.loras()[0]._replace(**change)
    with pytest.raises(ValueError, match=message):
        Sequence(decoder, 4).run(decoder.packed(), 0, 4, DecoderLoRA([lora]))


@pytest.mark.parametrize("rows", [torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[1]])])
def test_rows_that_do_not_fit_are_named(rows: Tensor) -> None:
    decoder = Decoder()
    with pytest.raises(ValueError, match="active row"):
        Sequence(decoder, 4).run(decoder.packed(), 0, 4, replace(DecoderLoRA(decoder.loras()), rows=rows))


@pytest.mark.slow
@pytest.mark.parametrize("instructions", FEWER)
def test_the_same_holds_with_fewer_instructions(instructions: str) -> None:
    names = (
        "test_states_equal_those_of_plain_layers[biases everywhere-scattered]",
        "test_other_tokens_keep_their_bits",
        "test_chunks_of_a_sequence_give_the_whole",
        "test_many_tokens_and_ranks",
    )
    run_with(instructions, *(f"{__file__}::{name}" for name in names))
