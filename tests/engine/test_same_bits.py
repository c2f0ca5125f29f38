"""Which log-probabilities have the same bits on a CPU, and how far the others may differ: docs/engine.md, On a CPU."""

from __future__ import annotations

import pytest
from tiny_models import ragged, tiny_language_model

from alignpro.engine import Completion, Engine, SamplingParams, derive_seed


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # with the fused decoder, and layer by layer
@pytest.mark.parametrize("count", [6, pytest.param(280, marks=pytest.mark.slow)])
def test_log_probabilities_have_the_same_bits_in_passes_of_the_same_rows(architecture: str, count: int) -> None:
    """A crowd that waits changes no bit. One that runs in the same passes changes the order of the head's sums."""
    model = tiny_language_model(architecture)
    params = SamplingParams(max_tokens=48, n=3)
    prompts = [[i % 60, i // 60, *rest] for i, rest in enumerate(ragged(count, 60, longest=20, seed=6))]
    seeds = [derive_seed(7, i) for i in range(count)]
    queued = Engine({"m": model}, max_batch=params.n, page_tokens=64).generate("m", prompts, params, seeds)
    crowded = Engine({"m": model}).generate("m", prompts, params, seeds)
    assert Engine({"m": model}, async_scheduling=True).generate("m", prompts, params, seeds) == crowded
    compared = 0
    for i, prompt in enumerate(prompts):
        (alone,) = Engine({"m": model}, page_tokens=64).generate("m", [prompt], params, [seeds[i]])
        assert queued[i] == alone
        assert [one.tokens for one in crowded[i]] == [one.tokens for one in alone]
        assert largest_difference(crowded[i], alone) < 2e-5
        compared += sum(len(one.logprobs) for one in alone)
    assert compared == count * params.n * params.max_tokens


def largest_difference(some: list[Completion], others: list[Completion]) -> float:
    pairs = zip(some, others, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one.logprobs, other.logprobs, strict=True))
