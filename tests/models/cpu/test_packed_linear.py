"""Linear layers with packed weights: the same products, always with the current weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from alignpro.models.cpu import packed_linear
from alignpro.models.cpu.packed_linear import PackedLinear, pack_linear_layers
from alignpro_kernels import backends

needs_cpp = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 64, bias=False), nn.Linear(64, 8)).to(dtype)


@needs_cpp
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_products_equal_those_of_plain_layers(rows: int) -> None:
    plain, packed = layers(), layers()
    assert pack_linear_layers(packed) is not None
    assert [type(layer) for layer in packed] == [PackedLinear, PackedLinear, nn.Linear]  # the last is too narrow
    x = torch.randn(2, rows, 96)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    assert packed.state_dict().keys() == plain.state_dict().keys()


@needs_cpp
def test_changes_of_weights_are_detected() -> None:
    packed = layers()
    packed_weights = pack_linear_layers(packed)
    assert packed_weights is not None
    x = torch.randn(20, 96)
    layer = packed[0]
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        doubled = layer(x)
        torch.testing.assert_close(doubled - layer.bias, 2 * (before - layer.bias), rtol=1e-5, atol=1e-5)
        layer.weight.data.copy_(layer.weight / 2)  # bypasses autograd's version counter, as a sharding optimizer does
        packed_weights.invalidate()
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_equal_those_of_plain_layers(frozen: bool) -> None:
    plain, packed = layers(), layers()
    pack_linear_layers(packed)
    x = torch.randn(3, 20, 96)
    found = []
    for model in (plain, packed):
        model[1].requires_grad_(not frozen)
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        found.append([inputs.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)


@needs_cpp
def test_a_copy_has_its_own_weights() -> None:
    packed = layers()
    pack_linear_layers(packed)
    x = torch.randn(20, 96)
    with torch.no_grad():
        expected = packed(x)
        other = copy.deepcopy(packed)
        other[0].weight.zero_()
        assert not torch.equal(other(x), expected)
        assert torch.equal(packed(x), expected)


def test_unsupported_dtypes_and_large_models_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack_linear_layers(layers(torch.bfloat16)) is None
    assert pack_linear_layers(layers(torch.float64)) is None
    monkeypatch.setattr(packed_linear, "MAX_PACKED_BYTES", {torch.float32: 1000})
    assert pack_linear_layers(layers()) is None


@needs_cpp
def test_layers_packed_together_are_stored_once() -> None:
    torch.manual_seed(0)
    query, key = nn.Linear(64, 96), nn.Linear(64, 64)
    model = nn.ModuleList([query, key])
    packed_weights = pack_linear_layers(model)
    assert packed_weights is not None
    both = packed_weights.panels(query, key)
    alone = packed_weights.panels(key)
    assert alone.weight.untyped_storage().data_ptr() == both.weight.untyped_storage().data_ptr()
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(key(x), nn.functional.linear(x, key.weight, key.bias), rtol=1e-5, atol=1e-5)
        key.weight.mul_(2)
    assert packed_weights.panels(query, key) is not both
    packed_weights.invalidate()
    assert packed_weights.panels(query, key) is not both
