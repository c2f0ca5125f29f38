"""Rotary embeddings that are looked up: the bits of those that are computed, for every position and after any change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_transformer
from torch import Tensor

from alignpro.models.cpu.rotary_table import RotaryTable

HIDDEN = torch.zeros(1, 1, 1)


def rotary(**settings: Any) -> Any:
    """Return the rotary embedding of a model."""
    model: Any = tiny_transformer("llama", **settings)
    return model.base_model.rotary_emb


def calls_of(module: Any) -> list[int]:
    """Record of how many positions each call of a module was."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[1].numel()))
    return calls


def assert_equal(table: RotaryTable, module: Any, positions: list[int]) -> None:
    at = torch.tensor([positions])
    for found, expected in zip(table(HIDDEN, at), module(HIDDEN, at), strict=True):
        assert isinstance(found, Tensor) and torch.equal(found, expected[0])


@pytest.mark.parametrize("kind", [{}, {"rope_type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_positions_are_looked_up_with_the_bits_of_the_module(kind: dict[str, Any]) -> None:
    module = rotary(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **kind})
    table = RotaryTable(module)
    for positions in ([0], [3, 3, 255], [256], [1000, 5], [70_000, 2], [0, 1]):
        assert_equal(table, module, positions)


def test_few_tables_are_computed() -> None:
    module = rotary()
    table, calls = RotaryTable(module), calls_of(module)
    for position in range(600):
        table(HIDDEN, torch.tensor([[position, 0]]))
    assert calls == [256, 512, 1024]
    assert [len(x) for x in table(HIDDEN, torch.zeros(1, 0, dtype=torch.int64))] == [0, 0]


def test_changed_frequencies_are_noticed() -> None:
    module = rotary()
    table = RotaryTable(module)
    assert_equal(table, module, [7, 8])
    module.inv_freq.mul_(0.5)
    assert_equal(table, module, [7, 8])
    module.inv_freq = module.inv_freq * 3
    assert_equal(table, module, [7, 8])
    module.attention_scaling = 2.0
    assert_equal(table, module, [7, 8])


def test_frequencies_that_depend_on_the_length_are_computed_each_time() -> None:
    module = rotary(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    table, calls = RotaryTable(module), calls_of(module)
    for _ in range(2):
        table(HIDDEN, torch.tensor([[5, 6, 7]]))
    assert calls == [3, 3]
