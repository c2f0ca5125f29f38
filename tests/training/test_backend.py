"""The optimizer: schedules, float32 copies of half-precision weights, clipping, and its state on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alignpro.config import OptimizerConfig
from alignpro.errors import CheckpointError, TrainingError
from alignpro.models.cpu.packed_linear import pack_linear_layers
from alignpro.training.backend import TorchBackend
from alignpro.training.learning_rate_schedule import learning_rate_factor


def parameter(values: list[float], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def make(weights: Mapping[str, nn.Parameter], total: int = 100, **config: object) -> TorchBackend:
    return TorchBackend(weights, OptimizerConfig.model_validate({"learning_rate": 0.1, **config}), total)


def descend(backend: TorchBackend, weight: Tensor, target: float = 0.0) -> float:
    backend.backward((weight.float() - target).square().sum())
    return backend.step()


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]),
        ("cosine", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1 / 2]),
        ("linear", 9, [t / 9 for t in range(1, 7)]),
    ],
)
def test_learning_rates_of_a_run_of_six_updates(schedule: str, warmup: int, expected: list[float]) -> None:
    weight = parameter([1.0])
    backend = make({"w": weight}, total=6, schedule=schedule, warmup_steps=warmup)
    rates = []
    for _ in range(6):
        rates.append(backend.learning_rate)
        descend(backend, weight)
    assert rates == pytest.approx([0.1 * share for share in expected])
    assert rates == pytest.approx(
        [0.1 * learning_rate_factor(t, 6, backend_config(schedule, warmup)) for t in range(6)]
    )


def backend_config(schedule: str, warmup: int) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 0.1, "schedule": schedule, "warmup_steps": warmup})


def test_the_learning_rate_stays_at_its_end_after_the_last_update() -> None:
    assert learning_rate_factor(10, 6, backend_config("linear", 0)) == 0
    assert learning_rate_factor(10, 6, backend_config("cosine", 0)) == 0


def test_the_update_equals_adamw() -> None:
    """Compared with torch's AdamW on manually clipped gradients."""
    ours, theirs = parameter([3.0, -4.0]), parameter([3.0, -4.0])
    backend = make({"w": ours}, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=2.0)
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for _ in range(5):
        norm = descend(backend, ours)
        theirs.grad = 2 * theirs.detach()
        expected = theirs.grad.norm().item()
        theirs.grad *= min(1.0, 2.0 / (expected + 1e-6))
        optimizer.step()
        assert norm == pytest.approx(expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_packed_layers_use_the_weights_after_an_update() -> None:
    """Fused optimizers do not increase a weight's version counter."""
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(3, 64)
    pack_linear_layers(layer)
    trained = make(dict(layer.named_parameters()), max_grad_norm=100)
    for _ in range(2):
        out = layer(x)
        torch.testing.assert_close(out, nn.functional.linear(x, layer[0].weight, layer[0].bias))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), out)
        trained.backward(out.sum())
        trained.step()
        assert not torch.allclose(layer(x), out, atol=0.1)


def test_the_norm_is_taken_before_clipping_over_all_weights() -> None:
    a, b = parameter([1.0]), parameter([1.0])
    backend = make({"a": a, "b": b}, max_grad_norm=1.0)
    backend.backward(3 * a.sum() + 4 * b.sum())
    assert backend.step() == pytest.approx(5.0)


def test_gradients_accumulate_over_backward_calls_and_are_cleared_by_a_step() -> None:
    weight = parameter([1.0])
    backend = make({"w": weight}, max_grad_norm=100.0)
    backend.backward(weight.sum())
    backend.backward(2 * weight.sum())
    assert backend.step() == pytest.approx(3.0)
    backend.backward(weight.sum())
    assert backend.step() == pytest.approx(1.0)


def test_small_updates_of_half_precision_weights_accumulate() -> None:
    """Relative updates of 1e-3, each too small for bfloat16 to represent at 1, add up to 0.1."""
    weight = parameter([1.0], torch.bfloat16)
    backend = make({"w": weight}, learning_rate=1e-3)
    for _ in range(100):
        backend.backward(weight.float().sum())
        backend.step()
    assert weight.dtype == torch.bfloat16
    assert weight.item() == pytest.approx(0.9, abs=0.005)


def test_small_updates_without_a_float32_copy_are_lost() -> None:
    """This shows that the test above can fail."""
    weight = parameter([1.0], torch.bfloat16)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.item() == 1.0


def test_gradients_of_half_precision_weights_are_summed_and_measured_in_float32() -> None:
    weight = parameter([1.0], torch.bfloat16)
    backend = make({"w": weight}, max_grad_norm=1e9)
    backend.backward(256 * weight.sum())
    for _ in range(8):  # each would be rounded away when added to 256 in bfloat16
        backend.backward(0.5 * weight.sum())
    assert backend.step() == pytest.approx(260.0)


def test_a_weight_without_gradient_does_not_change() -> None:
    """Even if it had a gradient in the step before."""
    used, unused = parameter([1.0], torch.bfloat16), parameter([1.0], torch.bfloat16)
    backend = make({"used": used, "unused": unused}, betas=(0.0, 0.0))
    backend.backward(unused.sum() + used.sum())
    backend.step()
    before = unused.item()
    backend.backward(used.sum())
    backend.step()
    assert unused.item() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float, dtype: torch.dtype) -> None:
    weight = parameter([1.0], dtype)
    backend = make({"w": weight})
    descend(backend, weight)
    before, updates = weight.item(), backend.updates
    backend.backward(weight.sum())  # the micro-batch before the bad one
    with pytest.raises(TrainingError, match=rf"the loss is {bad} after 1 updates: lower optimizer.learning_rate"):
        backend.backward(weight.sum() * bad)
    assert (weight.item(), backend.updates) == (before, updates)
    backend.backward(weight.sum() * 0)
    assert backend.step() == 0.0, "a gradient of the bad step is left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype: torch.dtype) -> None:
    weight = parameter([0.0, 1.0], dtype)
    backend = make({"w": weight})
    with pytest.raises(TrainingError, match=r"the gradient's norm is (nan|inf) after 0 updates"):
        backend.backward(weight.float().sqrt().sum())  # the loss is 1, its gradient at 0 infinite
        backend.step()
    assert weight.tolist() == [0.0, 1.0]
    assert backend.updates == 0
    backend.backward(weight.sum() * 0)
    assert backend.step() == 0.0


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"no weight .* requires a gradient: check policy.adapter"):
        make({})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loaded_state_continues_to_the_same_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = parameter([3.0, -2.0], dtype)
    backend = make({"w": weight}, total=8, schedule="cosine", warmup_steps=2)
    for _ in range(3):
        descend(backend, weight)
    backend.save(tmp_path, "policy")
    for _ in range(4):
        descend(backend, weight)

    other = parameter([0.0, 0.0], dtype)
    restored = make({"w": other}, total=8, schedule="cosine", warmup_steps=2)
    restored.load(tmp_path, "policy")
    assert restored.updates == 3
    for _ in range(4):
        descend(restored, other)
    assert torch.equal(other, weight)
    assert restored.learning_rate == backend.learning_rate
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.safetensors", "policy_optimizer.pt"]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    make({"w": parameter([1.0])}).save(tmp_path, "policy")
    for weights in ({"v": parameter([1.0])}, {"w": parameter([1.0, 2.0])}):
        with pytest.raises(CheckpointError, match="its weights are not those of this model"):
            make(weights).load(tmp_path, "policy")
