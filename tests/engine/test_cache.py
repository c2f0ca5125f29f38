"""The slab cache against transformers' own, which concatenates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import WINDOW, tiny_transformer
from transformers.cache_utils import DynamicCache, DynamicLayer

from alignpro.engine.cache import ROOM, SlabLayer, slab_cache


def _states(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 2, length, 4, generator=generator),
        torch.randn(rows, 2, length, 4, generator=generator),
    )


def _assert_equal(slab: SlabLayer, plain: DynamicLayer) -> None:
    assert torch.equal(slab.keys, plain.keys)
    assert torch.equal(slab.values, plain.values)
    assert slab.get_seq_length() == plain.get_seq_length()
    assert slab.get_mask_sizes(3) == plain.get_mask_sizes(3)


@given(st.integers(1, 5), st.lists(st.integers(1, ROOM) | st.lists(st.integers(0, 100), min_size=1, max_size=12)))
@settings(max_examples=100)
def test_a_layer_holds_what_a_concatenating_one_holds(rows: int, steps: list[int | list[int]]) -> None:
    slab, plain = SlabLayer(), DynamicLayer()
    for layer in (slab, plain):
        layer.update(*_states(rows, 3, 0))
    for number, step in enumerate(steps):
        if isinstance(step, int):  # that many new tokens
            new = _states(rows, step, number + 1)
            given_back = slab.update(*new)
            assert torch.equal(given_back[0], plain.update(*new)[0])
        else:  # these rows, in this order, some of them twice
            chosen = torch.tensor([index % rows for index in step])
            for layer in (slab, plain):
                layer.batch_select_indices(chosen)
            rows = len(chosen)
        _assert_equal(slab, plain)


def test_a_decoded_token_is_written_in_place() -> None:
    layer = SlabLayer()
    layer.update(*_states(4, 10, 0))
    at = layer.keys.data_ptr()
    for step in range(ROOM):
        layer.update(*_states(4, 1, step))
        layer.batch_select_indices(torch.arange(4))
        assert layer.keys.data_ptr() == at
    layer.update(*_states(4, 1, 0))
    assert layer.keys.data_ptr() != at


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
def test_a_model_computes_the_same_with_either(architecture: str) -> None:
    """Also beyond the sliding window, of which transformers' cache drops all before."""
    model = tiny_transformer(architecture)
    ids = torch.randint(0, 100, (3, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([2, 1])
    with torch.no_grad():
        results = []
        for cache in (slab_cache(model.config), DynamicCache(config=model.config)):
            first = model(input_ids=ids[:, : 2 * WINDOW], past_key_values=cache).logits
            cache.batch_select_indices(keep)
            steps = [model(input_ids=ids[keep, t : t + 1], past_key_values=cache).logits for t in range(16, 24)]
            results.append(torch.cat([first[keep], *steps], dim=1))
        whole = model(input_ids=ids[keep]).logits
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert torch.allclose(results[0], whole, atol=1e-5)
