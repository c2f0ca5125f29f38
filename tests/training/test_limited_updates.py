"""The KL of an update to the policy before it, measured exactly, and updates that are shortened by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_world import World
from torch import Tensor, nn

from alignpro.config import OptimizerConfig
from alignpro.training.backend import TorchBackend
from alignpro.training.reinforcement import RLTrainer

LAMBDA = 0.5


def backend(weights: list[Tensor], **config: object) -> tuple[TorchBackend, list[nn.Parameter]]:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    settings = OptimizerConfig.model_validate({"learning_rate": 0.1, **config})
    return TorchBackend({str(i): each for i, each in enumerate(parameters)}, settings, 100), parameters


def descend(made: TorchBackend, weights: list[nn.Parameter], factor: float = 1.0) -> None:
    made.backward(sum((weight.float() ** 3).sum() for weight in weights))  # type: ignore[arg-type]
    made.step(factor)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3}, {"schedule": "linear", "warmup_steps": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shortened_update_is_that_at_a_lower_rate(settings: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3).to(dtype), torch.randn(4).to(dtype)]
    (ours, weights), (theirs, expected) = backend(start, **settings), backend(start, **settings)
    for _ in range(3):
        descend(ours, weights)
        descend(theirs, expected)
    before = [weight.clone() for weight in ours._master.values()]
    rate = ours.learning_rate
    descend(ours, weights)
    ours.shorten(0.5)
    ours.shorten(0.03)
    descend(theirs, expected, 0.03)
    torch.testing.assert_close(list(ours._master.values()), list(theirs._master.values()), rtol=1e-6, atol=1e-6)
    assert ours.learning_rate == theirs.learning_rate  # the schedule goes on as without a factor
    assert rate > 0
    descend(ours, weights)
    ours.shorten(0.0)
    descend(theirs, expected, 0.0)
    torch.testing.assert_close(list(ours._master.values()), list(theirs._master.values()), rtol=1e-6, atol=1e-6)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(before, ours._master.values(), strict=True))
    assert [w.dtype for w in weights] == [dtype] * 2
    torch.testing.assert_close([w.float() for w in weights], [m.to(dtype).float() for m in ours._master.values()])


def test_a_weight_without_a_gradient_is_not_moved_by_shortening() -> None:
    made, (first, second) = backend([torch.ones(3), torch.ones(3)])
    descend(made, [first, second])
    still = second.detach().clone()
    descend(made, [first])
    made.shorten(0.1)
    assert torch.equal(second, still)


def train(world: World, rate: float, steps: int, out: Path, group: int = 8, **objective: object) -> RLTrainer:
    settings = {"kl": {"coef": LAMBDA}, **objective}
    return world.training(settings, group, out, steps=steps, learning_rate=rate, schedule="linear")


def test_the_measured_kl_is_that_of_the_enumerated_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(torch.float32, drift=0.0)
    training = train(world, 0.02, 3, tmp_path)
    kept = []
    begin = training.limited.begin

    def record(*arguments: object) -> None:
        begin(*arguments)  # type: ignore[arg-type]
        assert training.limited._before is not None
        kept.extend(training.limited._before.parts)

    monkeypatch.setattr(training.limited, "begin", record)
    old = world.next_logprobs().detach()
    metrics = training.step(0)
    new = world.next_logprobs().detach()  # (P, S, T, V)
    per_sequence = torch.where(world.space.mask, (new.exp() * (new - old)).sum(-1), 0.0).sum(-1)  # (P, S)
    row = {tuple(world.encode(prompt)): p for p, prompt in enumerate(world.prompts)}
    drawn = [
        per_sequence[row[tuple(prompt)], world._number[tuple(tokens)]]
        for part in kept
        for prompt, tokens in zip(part.prompts, part.completions, strict=True)
    ]
    assert (
        len({tuple(prompt) for part in kept for prompt in part.prompts}) == len(drawn) == 2
    )  # a sample of each prompt
    assert metrics["kl_step"] == pytest.approx(torch.stack(drawn).mean().item(), rel=1e-3)
    assert metrics["kl_step"] > 0.01


def test_without_a_limit_nothing_is_measured_and_a_wide_one_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for limit in (None, 100.0):
        world = World(torch.float32, drift=0.0)
        training = train(world, 0.02, 2, tmp_path, step_kl=limit)
        rows = [training.step(step) for step in range(2)]
        weights.append([weight.detach().clone() for weight in training.policy.trainable.values()])
        assert all(("kl_step" in row) == (limit is not None) for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_rate_that_is_far_too_high_does_no_harm(tmp_path: Path) -> None:
    """Without the limit, the first steps end the training: J falls below that of the start, and stays there."""
    reached = {}
    for limit in (None, 0.05):
        world = World(torch.float32, drift=0.0)
        start = world.objective(LAMBDA).item()
        training = train(world, 0.5, 10, tmp_path, step_kl=limit)
        rows = [training.step(step) for step in range(10)]
        reached[limit] = world.objective(LAMBDA).item() - start
    assert reached[None] < -0.1
    assert reached[0.05] > 0.02
    assert max(row["kl_step"] for row in rows) < 0.11
    assert all(row["learning_rate_factor"] < 1 for row in rows[:5])


def test_several_updates_of_a_rollout_are_limited_together(tmp_path: Path) -> None:
    world = World(torch.float32, drift=0.0)
    training = train(world, 0.3, 3, tmp_path, loss="ppo_clip", epochs=3, minibatches=2, step_kl=0.1)
    for step in range(3):
        old = world.sequence_logprobs().detach()
        assert training.step(step)["kl_step"] <= 0.2
        new = world.sequence_logprobs().detach()
        assert (new.exp() * (new - old)).sum(1).mean() < 0.5


@pytest.mark.parametrize("loss", ["distillation", "gibbs", "ppo_clip"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_many_updates_of_a_rollout_leave_a_rate_that_still_learns(loss: str, schedule: str, tmp_path: Path) -> None:
    """The limit of a step is reached before its last update: that must not lower the rate for good."""
    world = World(torch.float32, drift=0.0)
    settings = {"kl": {"coef": 0.3}, "loss": loss, "epochs": 10, "minibatches": 2, "step_kl": 0.2}
    training = world.training(settings, 8, tmp_path, steps=8, learning_rate=0.03, schedule=schedule)
    rows = [training.step(step) for step in range(8)]
    assert rows[0]["updates"] == 1  # which alone went too far
    assert all(row["kl_step"] <= 0.4 for row in rows)
    assert min(row["learning_rate_factor"] for row in rows) > 1e-3
    assert sum(row["updates"] for row in rows[1:]) > 70 and sum(row["kl_step"] for row in rows[1:]) > 0.3
    assert training.backend.learning_rate == (0.03 if schedule == "constant" else 0.0)


def test_the_schedule_ends_with_the_run_whatever_there_was_to_learn_from(tmp_path: Path) -> None:
    world = World(torch.float32, drift=0.0)
    settings = {"kl": {"coef": 0.3}, "loss": "distillation", "epochs": 3, "minibatches": 4}
    training = world.training(settings, 8, tmp_path, steps=3, learning_rate=0.01, schedule="linear")
    world.rewards.fill_(0.5)  # equal rewards: nothing is kept
    rates = []
    for step in range(3):
        rates.append(training.backend.learning_rate)
        assert training.step(step)["updates"] == 0
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3]) and training.backend.learning_rate == 0
    assert training.backend.updates == 0


@pytest.mark.slow
def test_rates_over_two_decades_reach_the_same_objective(tmp_path: Path) -> None:
    reached = []
    for rate in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        world = World(torch.float32, drift=0.0)
        training = train(world, rate, 60, tmp_path, group=32, step_kl=0.05)
        for step in range(60):
            training.step(step)
        reached.append(world.objective(LAMBDA).item())
    assert min(reached) > 0.95 * max(reached)
    assert max(reached) == pytest.approx(0.549, abs=0.002)
