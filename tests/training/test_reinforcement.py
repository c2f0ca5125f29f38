"""The trainer's minibatches, micro-batches, number of updates and metrics."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import World, credit, distance, shake, take_gradient
from torch import Tensor

from alignpro.config import AdapterConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, derive_seed
from alignpro.environments.base import Scores
from alignpro.objectives import RunningBaseline
from alignpro.training.experience import join_rows
from alignpro.training.gradient_accumulation import split_minibatches
from alignpro.training.loggers.jsonl import read_rows
from alignpro.training.metrics import EXECUTION_METRICS, Evaluation, Metrics
from alignpro.training.reinforcement import RLTrainer

GROUPS = [(0, 9), (14, 3), (5, 5), (1, 12)]
"""Pairs of sequences, by index; their lengths are 1 and 3, 3 and 3, 3 and 3, 2 and 3."""
LAMBDA = 0.3


class RecordingWorld(World):
    """A world that records the last samples."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        self.sampled = [(x, chain.sample.tokens) for x, group in zip(prompts, chains, strict=True) for chain in group]
        return super().score(prompts, chains)


def weights_of(training: RLTrainer) -> list[Tensor]:
    """Return copies of the trained weights."""
    return [weight.detach().clone() for weight in training.policy.trainable.values()]


def gradients(training: RLTrainer, moved: float = 0.0) -> tuple[list[Tensor], list[Tensor], Metrics]:
    """Return gradients of policy and critic, and metrics, on `GROUPS` with both prompts; ``moved`` changes the policy first."""
    experience = credit_both(training).select(torch.arange(2 * len(GROUPS)), 2)
    torch.manual_seed(1)
    shake(training.policy.model, moved)
    metrics = training.accumulate(experience, training.kl)
    critic = training.critic.model.parameters() if training.critic else ()
    return take_gradient(training.policy.trainable.values()), take_gradient(critic), metrics


def credit_both(training: RLTrainer) -> Any:
    """Return the experience of `GROUPS` with both prompts."""
    assert isinstance(training.environment, World)
    return credit(training.environment, training, GROUPS)


# ------------------------------------------------------------------------------------------------------- minibatches


def test_a_minibatch_holds_the_rows_of_its_groups() -> None:
    world = World()
    training = world.training({"advantage": "gae"}, 2, micro_batch_size=3)
    experience = credit_both(training)
    part = experience.select(torch.tensor([5, 2]), 2)
    rows = torch.tensor([10, 11, 4, 5])
    sequences = [world.space.sequences[s] for s in (14, 3, 5, 5)]
    assert [row[keep].tolist() for row, keep in zip(part.batch.actions, part.batch.mask, strict=True)] == sequences
    assert [prompt[0] for prompt in part.batch.prompts] == [2, 2, 1, 1]  # the first token of each prompt
    values = training.policy.token_stats(part.batch)  # computed from these rows alone
    torch.testing.assert_close(part.values.logprob, values.logprob)
    torch.testing.assert_close(part.values.reference_logprob, values.reference_logprob)
    torch.testing.assert_close(part.values.kl, values.kl)
    torch.testing.assert_close(part.values.entropy, values.entropy)
    used = part.values.reference_states[part.state_index[part.batch.mask]]
    torch.testing.assert_close(used, values.reference_states)
    for name in ("scores", "returns", "advantages", "value_targets"):
        assert torch.equal(getattr(part, name), getattr(experience, name)[rows])


def test_each_epoch_takes_every_group_once_in_a_new_order() -> None:
    orders = []
    for step, epoch in ((0, 0), (0, 1), (1, 0)):
        parts = split_minibatches(10, 3, derive_seed(0, "minibatch", step, epoch))
        assert [len(part) for part in parts] == [4, 3, 3]
        orders.append(torch.cat(parts).tolist())
        assert sorted(orders[-1]) == list(range(10))
        assert torch.equal(
            torch.cat(split_minibatches(10, 3, derive_seed(0, "minibatch", step, epoch))), torch.tensor(orders[-1])
        )
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
def test_one_optimizer_step_per_minibatch_and_epoch(advantage: str, tmp_path: Path) -> None:
    objective = {"loss": "ppo_clip", "advantage": advantage, "epochs": 3, "minibatches": 2, "step_kl": None}
    training = World().training(objective, 2, tmp_path, steps=4, learning_rate=0.01, schedule="linear")
    training.step(0)
    assert training.updates == 6
    assert training.critic is None or training.critic.backend.updates == 6
    assert training.backend.learning_rate == pytest.approx(0.01 * (1 - 6 / 24))  # the schedule ends with the run


# ----------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize(
    "objective",
    [
        {"advantage": "leave_one_out"},
        {"advantage": "gae", "normalize_by": "token"},
        {"loss": "ppo_clip", "advantage": "group_normalized", "clip_range": 0.05, "entropy_coef": 0.1},
        {"loss": "gibbs"},
        {"loss": "distillation"},
    ],
    ids=["policy_gradient", "critic", "ppo_clip", "gibbs", "distillation"],
)
def test_micro_batches_change_nothing(objective: dict[str, Any]) -> None:
    whole, whole_critic, expected = gradients(World().training(objective, 2, micro_batch_size=64), moved=0.05)
    assert max(g.abs().max() for g in whole) > 1e-3
    for size in (1, 3, 4):
        parts, parts_critic, metrics = gradients(World().training(objective, 2, micro_batch_size=size), moved=0.05)
        assert distance(parts, whole) < 1e-13
        assert not whole_critic or distance(parts_critic, whole_critic) < 1e-13
        # An advantage that is zero up to rounding may have either sign, which decides whether its token is clipped.
        assert metrics.pop("clip_fraction", 0.0) == pytest.approx(expected.get("clip_fraction", 0.0), abs=0.03)
        assert metrics == pytest.approx({name: x for name, x in expected.items() if name != "clip_fraction"})
    assert 0.1 < expected.get("clip_fraction", 0.5) < 0.9


def test_micro_batches_have_at_most_the_configured_size_except_for_groups_of_gibbs() -> None:
    def sizes(loss: str, group: int) -> list[int]:
        training = World().training({"loss": loss}, group, micro_batch_size=4)
        return [stop - start for start, stop in training.accumulate.micro_batches(18)]

    assert sizes("policy_gradient", 6) == [4, 4, 4, 4, 2]
    assert sizes("gibbs", 6) == [6, 6, 6]
    assert sizes("gibbs", 3) == [3] * 6


# --------------------------------------------------------------------------------------------------------------- loss


def test_normalizing_by_token_is_a_mean_over_tokens() -> None:
    by_sequence, _, _ = gradients(World().training({"normalize_by": "sequence"}, 2))
    by_token, _, _ = gradients(World().training({"normalize_by": "token"}, 2))
    rows, tokens = 16, 2 * (1 + 3 + 3 + 3 + 3 + 3 + 2 + 3)
    assert distance(by_token, by_sequence, factor=rows / tokens) < 1e-15


def test_nothing_is_clipped_before_the_policy_has_moved(tmp_path: Path) -> None:
    objective = {"loss": "ppo_clip", "clip_range": 0.01, "step_kl": None}
    once = World().training(objective, 8, tmp_path, learning_rate=0.05).step(0)
    assert once["clip_fraction"] == 0
    assert once["old_policy_kl"] == pytest.approx(0, abs=1e-12)
    twice = World().training(objective | {"epochs": 2}, 8, tmp_path, learning_rate=0.05).step(0)
    assert 0 < twice["clip_fraction"] <= 0.5  # the mean over both epochs
    assert twice["old_policy_kl"] > 1e-4


# ------------------------------------------------------------------------------------------------------------- metrics


def rows_of(world: RecordingWorld, along: Tensor) -> Tensor:
    """Return the rows of the sampled sequences, (P, S, ...) → (B, ...)."""
    prompts = [prompt.id for prompt in world.prompts]
    return torch.stack([along[prompts.index(x.id), world.space.sequences.index(y)] for x, y in world.sampled])


def test_metrics_of_a_step_are_computed_from_its_samples(tmp_path: Path) -> None:
    world = RecordingWorld()
    training = world.training(
        {"advantage": "running_baseline", "kl": {"coef": LAMBDA}}, 8, tmp_path, learning_rate=0.01
    )
    with torch.no_grad():  # before the step, since metrics belong to the policy that sampled
        logprob, reference = world.next_logprobs(), world.reference_next_logprobs()
        sampled_kl = world.sequence_logprobs() - world.reference_logprobs()
    metrics = training.step(0)

    mask = world.space.mask.expand(2, -1, -1)  # (P, S, T)
    kl = torch.where(mask, (logprob.exp() * (logprob - reference)).sum(-1), 0.0)
    entropy = torch.where(mask, -(logprob.exp() * logprob).sum(-1), 0.0)
    rewards, lengths = rows_of(world, world.rewards), rows_of(world, mask.sum(-1)).double()
    kl = rows_of(world, kl)  # (B, T)
    assert len(rewards) == 16
    assert metrics["kl"] == pytest.approx(kl.sum(1).mean().item())
    assert metrics["kl_sampled"] == pytest.approx(rows_of(world, sampled_kl).mean().item())
    assert metrics["entropy"] == pytest.approx((rows_of(world, entropy).sum() / lengths.sum()).item())
    assert metrics["sample/length"] == lengths.mean().item()
    assert metrics["reward/mean"] == pytest.approx(rewards.mean().item())
    assert metrics["reward/std"] == pytest.approx(rewards.std().item())
    assert metrics["kl_coef"] == LAMBDA
    assert metrics["learning_rate"] == 0.01
    assert metrics["gradient_norm"] > 0
    assert {f"seconds/{phase}" for phase in ("rollout", "reward", "credit", "update")} <= set(metrics)
    assert set(training.progress_metrics) <= set(metrics)
    assert metrics["sample/logprob_difference_max"] < 1e-5
    assert metrics["engine/floor_ratio"] == 1.0  # two prompts without a common prefix, each computed once
    assert metrics["engine/computed/prefill"] == sum(len(world.encode(prompt)) for prompt in world.prompts)
    assert metrics["engine/computed/decode"] == lengths.sum() - len(lengths)
    assert metrics["engine/preemptions"] == metrics["engine/computed/recompute"] == 0
    assert metrics["engine/pages/policy"] > 0
    assert metrics["engine/tokens_per_s"] > 0
    assert sum(metrics[f"engine/seconds/{phase}"] for phase in ("plan", "forward", "sample")) > 0
    # The baseline of the next step is the return of a whole sequence without the KL of its first state.
    assert isinstance(training.advantage, RunningBaseline)
    assert training.advantage.value == pytest.approx((rewards - LAMBDA * kl[:, 1:].sum(1)).mean().item())


def test_samples_of_another_policy_show_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = RecordingWorld()
    training = world.training({"kl": {"coef": LAMBDA}}, 8, tmp_path)
    environment, rollout = training.environment, training.environment.rollout

    def elsewhere(*arguments: Any) -> Any:
        chains = rollout(*arguments)
        chains[1][0].sample.logprobs[0] -= 0.5
        return chains

    monkeypatch.setattr(environment, "rollout", elsewhere)
    metrics = training.step(0)
    tokens = metrics["sample/length"] * 16
    assert metrics["sample/logprob_difference_max"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["sample/logprob_difference"] == pytest.approx(0.5 / tokens, abs=1e-5)


def test_the_kl_coefficient_adapts_after_the_step_that_used_it(tmp_path: Path) -> None:
    kl = {"coef": LAMBDA, "target": 1e-3, "horizon": 16}
    training = World().training({"kl": kl}, 8, tmp_path, steps=2, learning_rate=1e-4)
    assert training.step(0)["kl_coef"] == LAMBDA
    assert training.step(1)["kl_coef"] == pytest.approx(1.2 * LAMBDA)  # the largest increase in a horizon


def test_a_sample_of_each_step_is_written(tmp_path: Path) -> None:
    world = RecordingWorld()
    world.training({}, 2, tmp_path).step(0)
    (row,) = read_rows(tmp_path / "samples.jsonl")
    prompt, tokens = world.sampled[0]
    assert row["step"] == 1
    assert row["prompt"] == prompt.text
    assert row["sample"] == " ".join(map(str, tokens))
    assert row["value"] == pytest.approx(rows_of(world, world.rewards)[0].item())


# --------------------------------------------------------------------------------------------------------- whole steps


def test_a_step_is_a_function_of_its_seed(tmp_path: Path) -> None:
    def run() -> Iterator[tuple[dict[str, float], list[Tensor]]]:
        objective = {"loss": "ppo_clip", "advantage": "gae", "epochs": 2, "minibatches": 2}
        training = World().training(objective, 4, tmp_path, steps=3, learning_rate=0.01)
        for step in range(3):
            metrics = training.step(step)
            torch.rand(7)  # others may draw from the global generator
            yield {k: v for k, v in metrics.items() if not k.startswith(EXECUTION_METRICS)}, weights_of(training)

    for (left, left_weights), (right, right_weights) in zip(run(), run(), strict=True):
        assert left == right
        assert all(map(torch.equal, left_weights, right_weights))


def test_evaluation_is_the_same_each_time_and_changes_nothing() -> None:
    world = RecordingWorld()
    training = world.training({}, 4)
    weights, randomness = weights_of(training), torch.get_rng_state()
    first = training.evaluate(0)
    assert len(world.sampled) == 2  # one sample of each prompt
    logprob, reference = world.next_logprobs(), world.reference_next_logprobs()
    kl = torch.where(world.space.mask, (logprob.exp() * (logprob - reference)).sum(-1), 0.0).sum(-1)
    reward, kl = rows_of(world, world.rewards), rows_of(world, kl)
    objective = reward - training.objective.kl.coef * kl
    assert first.objective == pytest.approx(objective.tolist())
    assert first.metrics == pytest.approx(
        {
            "eval/reward": reward.mean().item(),
            "eval/kl": kl.mean().item(),
            "eval/objective": objective.mean().item(),
            "eval/objective_error": objective.std().item() / math.sqrt(2),
        }
    )
    assert training.evaluate(7) == first
    assert all(map(torch.equal, weights, weights_of(training)))
    assert torch.equal(randomness, torch.get_rng_state())
    training.heldout = []
    assert training.evaluate(0) == Evaluation()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
@pytest.mark.parametrize("advantage", ["leave_one_out", "gae"])
def test_an_adapter_is_trained_and_its_base_is_not(kind: str, advantage: str, tmp_path: Path) -> None:
    world = World(adapter=AdapterConfig(kind=kind, rank=2, virtual_tokens=2), drift=0.0)
    training = world.training({"advantage": advantage}, 8, tmp_path, steps=2, learning_rate=0.05)
    trained = weights_of(training)
    frozen = {n: w.clone() for n, w in world.policy.model.named_parameters() if not w.requires_grad}
    reference = world.reference_logprobs()
    before = training.step(0)
    if kind == "lora":
        assert before["kl"] == 0  # a new LoRA has no effect
    assert training.step(1)["kl"] > 1e-4
    assert any(not torch.equal(a, b) for a, b in zip(trained, weights_of(training), strict=True))
    weights = dict(world.policy.model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in frozen.items())
    assert torch.equal(world.reference_logprobs(), reference)


# -------------------------------------------------------------------------------------------------------------- critic


def test_the_critic_starts_at_zero_and_learns_the_returns() -> None:
    world = World(drift=0.0)
    training = world.training({"advantage": "gae"}, 2, steps=40, learning_rate=0.02)
    assert training.critic is not None
    experience = credit_both(training)
    torch.testing.assert_close(experience.advantages, experience.returns)  # V = 0 everywhere
    policy = weights_of(training)
    targets, mask = experience.returns, experience.batch.mask
    (before,) = training.critic.values([experience.batch])
    losses = []
    for _ in range(40):
        training.critic.backward(experience.batch, targets, 1 / 16)
        losses.append(training.critic.step()["value_loss"])
    assert losses[0] == pytest.approx((targets[mask].square().sum() / 32).item())
    assert losses[-1] < 0.2 * losses[0]
    after = join_rows(
        training.critic.values([experience.batch.rows(0, 3), experience.batch.rows(3, 16)]), 16, mask.shape[1]
    )
    assert (after - targets)[mask].square().mean() < 0.2 * (before - targets)[mask].square().mean()
    assert (after[~mask] == 0).all()
    assert all(map(torch.equal, policy, weights_of(training)))  # it shares no weight with the policy


def test_a_step_says_how_the_kl_was_charged(tmp_path: Path) -> None:
    """β is what the earlier steps' samples say; λ in units of the scores' deviation is logged where they are divided by it."""
    training = World(drift=0.5).training({"kl": {"coef": 0.1}}, 8, tmp_path)
    first, second = training.step(0), training.step(1)
    assert first["kl_sampled_share"] == 0
    assert 0 <= second["kl_sampled_share"] <= 1
    assert training.kl.state_dict()["variance"] > 0
    assert "kl_coef_normalized" not in second
    grpo = World(drift=0.5).training(
        {"advantage": "group_normalized", "kl": {"coef": 0.1, "estimator": "exact"}}, 8, tmp_path
    )
    metrics = grpo.step(0)
    assert "kl_sampled_share" not in metrics
    assert metrics["kl_coef_normalized"] > 0.1  # rewards deviate by less than 1
