"""Gated MLPs with gradients: equal to those of separate operations, with less kept for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from alignpro.models.cpu import fused_layers
from alignpro.models.cpu.packed_linear import pack_linear_layers
from alignpro_kernels import backends

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")

D, WIDE, TOKENS = 64, 160, 7


class Block(nn.Module):
    """A module with an MLP inside, which an adapter can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=WIDE))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out


def fuse(block: Block) -> None:
    assert pack_linear_layers(block) is not None
    fused_layers.fuse_layers(block)


def plain_and_fused(*, lora: bool, trained: bool = False, saved: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return a block and a copy whose MLP is fused; with a LoRA on all layers, or ``trained`` weights of its own.

    The MLP is fused before the LoRA is added, or after it, as in a model that is loaded with a ``saved`` one.
    """
    torch.manual_seed(0)
    plain = Block().requires_grad_(trained)
    fused = copy.deepcopy(plain)
    if not saved:
        fuse(fused)
    if not lora:
        return plain, fused
    made = []
    for block in (plain, fused):
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
        made.append(get_peft_model(block, config).eval())
    if saved:
        fuse(fused)
    return made[0], made[1]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return outputs and the gradients of the input and of all trained weights."""
    inputs = x.clone().requires_grad_()
    out = model(inputs)
    out.square().sum().backward()
    weights = [w for w in model.parameters() if w.requires_grad]
    assert inputs.grad is not None and all(w.grad is not None for w in weights)
    return [out.detach(), inputs.grad, *(w.grad for w in weights if w.grad is not None)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each MLP that is computed as one."""
    run, found = fused_layers.gated_mlp, list[int]()

    def counted(x: Tensor, *layers: Any) -> Tensor:
        found.append(x.shape[-2])
        return run(x, *layers)

    monkeypatch.setattr(fused_layers, "gated_mlp", counted)
    return found


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"lora": False, "trained": True}, 5),
        ({"lora": False}, 2),
        ({"lora": True}, 8),
        ({"lora": True, "saved": True}, 8),
    ],
)
def test_gradients_equal_those_of_separate_operations(calls: list[int], settings: dict[str, bool], count: int) -> None:
    plain, fused = plain_and_fused(**settings)
    x = torch.randn(2, TOKENS, D)
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    found, expected = gradients(fused, x), gradients(plain, x)
    assert len(found) == len(exact) == count and calls == [TOKENS]
    for one, other, truth in zip(found, expected, exact, strict=True):
        error, of_separate = ((each - truth).norm() / truth.norm() for each in (one, other))
        assert error <= 1.5 * of_separate + 1e-7


def test_frozen_weights_get_no_gradient() -> None:
    _, fused = plain_and_fused(lora=True)
    gradients(fused, torch.randn(TOKENS, D))
    assert {name.split(".")[-3] for name, w in fused.named_parameters() if w.grad is not None} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    "name", ["up_proj.weight", "down_proj.weight", "gate_proj.lora_A.default.weight", "down_proj.lora_B.default.weight"]
)
def test_a_weight_that_changes_before_the_backward_pass_is_an_error(name: str, calls: list[int]) -> None:
    lora = "lora" in name
    _, fused = plain_and_fused(lora=lora, trained=not lora)
    out = fused(torch.randn(TOKENS, D, requires_grad=True)).sum()
    with torch.no_grad():
        next(weight for each, weight in fused.named_parameters() if each.endswith(name)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    assert calls == [TOKENS]


def test_second_derivatives_are_refused_rather_than_left_out() -> None:
    _, fused = plain_and_fused(lora=False, trained=True)
    x = torch.randn(TOKENS, D, requires_grad=True)
    with pytest.raises(RuntimeError, match="for second derivatives use a model whose layers are not packed"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)


def test_what_is_kept_are_the_input_and_both_inner_products() -> None:
    kept = list[int]()

    def count(model: nn.Module) -> int:
        own = {w.untyped_storage().data_ptr() for w in model.parameters()}
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(100, D, requires_grad=True))
        return sum({pointer: size for pointer, size in places if pointer not in own}.values())

    places = list[tuple[int, int]]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        places.append((storage.data_ptr(), storage.nbytes() // 4))
        return tensor

    plain, fused = plain_and_fused(lora=True)
    places.clear()
    assert count(fused) == 100 * (D + 2 * WIDE + 3 * 3)
    places.clear()
    assert count(plain) >= 100 * (D + 4 * WIDE + 3 * 3)


@pytest.mark.parametrize("adapter", [True, False])
def test_passes_without_gradients(adapter: bool) -> None:
    plain, fused = plain_and_fused(lora=True)
    x = torch.randn(2, TOKENS, D)
    with torch.no_grad():
        for model in (plain, fused):
            if not adapter:
                model.disable_adapter_layers()  # type: ignore[operator]
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def hooked(model: nn.Module) -> None:
    found = next(module for name, module in model.named_modules() if name.endswith("up_proj"))
    found.register_forward_hook(lambda module, inputs, out: 2 * out)


def with_dropout(model: nn.Module) -> None:
    model.train()
    for name, _ in list(model.named_modules()):
        if name.endswith("lora_dropout.default"):
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            parent["default"] = nn.Dropout(0.0)


def with_two_adapters(model: Any) -> None:
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("change", [hooked, with_dropout, with_two_adapters])
def test_what_a_layer_does_beside_one_lora_is_done(change: Callable[[Any], None], calls: list[int]) -> None:
    plain, fused = plain_and_fused(lora=True)
    for model in (plain, fused):
        change(model)
    x = torch.randn(TOKENS, D)
    for one, other in zip(gradients(fused, x), gradients(plain, x), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert not calls
