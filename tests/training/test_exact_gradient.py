"""The trainer's gradient, averaged over all possible samples, is ∇J.

The trainer's own credit and backward run on a float64 model and both prompts at once in several micro-batches. The result
is compared with autograd of J summed over all sequences. `tests/objectives` shows the same for the pure functions alone.
"""

import itertools
from typing import get_args

import pytest
import torch
from tiny_world import LENGTH, World, couple, credit, credit_ahead, distance, shake, take_gradient
from torch import Tensor

from alignpro import objectives
from alignpro.config import AdapterConfig
from alignpro.training.experience import Experience
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.rollouts import SamplingAhead

LAMBDA = 0.3
GROUP = {name: 2 if kind.needs_group else 1 for name, kind in objectives.ADVANTAGES.items()}

UNBIASED = [
    (estimator, advantage)
    for estimator in get_args(objectives.KLEstimator)
    for advantage, kind in objectives.ADVANTAGES.items()
    if objectives.is_unbiased(estimator, kind())
]


def world_for(advantage: str) -> World:
    """Return a world of two tokens where samples come in groups, 28 of them, else of three tokens, with 15 sequences."""
    return World(length=LENGTH if GROUP[advantage] == 1 else 2)


def make_training(
    world: World,
    estimator: str,
    advantage: str,
    loss: str = "policy_gradient",
    entropy_coef: float = 0.0,
    ahead: SamplingAhead | None = None,
) -> RLTrainer:
    """Return a trainer with micro-batches of three rows, which split groups, except for gibbs, which needs whole groups."""
    objective = {"loss": loss, "advantage": advantage, "kl": {"coef": LAMBDA, "estimator": estimator}}
    objective["entropy_coef"] = entropy_coef
    training = world.training(objective, GROUP[advantage], micro_batch_size=3, ahead=ahead)
    training.advantage.update(0.7)
    training.kl.update(0.0, 1, covariance=0.4 * LAMBDA, variance=1.0)  # of earlier steps: β = 0.4
    if training.critic is not None:
        shake(training.critic.model, 0.5)  # an untrained critic with nonzero values
    return training


def expected_gradient(
    world: World, training: RLTrainer, sampled: Tensor | None = None, corrected: bool = True
) -> list[Tensor]:
    """Return the expected gradient of the loss, over every group of K samples for each of the two prompts.

    The order of a group's samples does not matter, so that each group stands for those in another order too.

    Args:
        world: Has the current policy.
        training: Its trainer.
        sampled: (P, S, T) log-probability of every action under the policy that draws the samples; None for the current one.
        corrected: Whether samples of another policy are corrected.
    """
    size = training.sampling.n
    groups = list(itertools.combinations_with_replacement(range(len(world.chains)), size))
    if sampled is None:
        experience, logprob = credit(world, training, groups), world.sequence_logprobs().detach()
    else:
        experience, chains = credit_ahead(world, training, groups, sampled)
        logprob = torch.where(world.space.mask, sampled, 0.0).sum(-1)
        experience = training.rollouts.corrected(experience, chains) if corrected else experience
    orders = torch.tensor([len(set(itertools.permutations(group))) for group in groups])
    probability = torch.stack([logprob[:, list(group)].sum(1) for group in groups], dim=1).exp() * orders  # (P, groups)
    expected = [torch.zeros_like(weight) for weight in training.policy.trainable.values()]
    for first, second, weight in couple(*probability):
        gradient = gradient_of(training, experience, [first, len(groups) + second])
        expected = [total + weight * g for total, g in zip(expected, gradient, strict=True)]
    return expected


def gradient_of(training: RLTrainer, experience: Experience, groups: list[int]) -> list[Tensor]:
    """Return the gradient of the loss of some groups of the experience."""
    training.accumulate(experience.select(torch.tensor(groups), training.sampling.n), training.kl)
    return take_gradient(training.policy.trainable.values())


def objective_gradient(world: World, entropy_coef: float = 0.0) -> list[Tensor]:
    """Return ∇(J + c E Σ_t H_t)."""
    weights = list(world.policy.trainable.values())
    logprob = world.sequence_logprobs()
    entropy = -(logprob.exp() * logprob).sum(1).mean()  # of whole sequences: the expected sum over the states visited
    gradient = torch.autograd.grad(world.objective(LAMBDA) + entropy_coef * entropy, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradient, strict=True)]


def test_the_unbiased_estimators_are_those_named_here() -> None:
    assert {a for _, a in UNBIASED} == {"leave_one_out", "running_baseline", "gae"}
    assert {e for e, _ in UNBIASED} == {"regressed", "exact", "k1", "k1_sequence"}


@pytest.mark.parametrize(("estimator", "advantage"), UNBIASED)
def test_expected_gradient_is_the_gradient_of_the_objective(estimator: str, advantage: str) -> None:
    world = world_for(advantage)
    expected = expected_gradient(world, make_training(world, estimator, advantage))
    truth = objective_gradient(world)
    assert distance(expected, truth, factor=-1.0) < 1e-10
    assert max(g.abs().max() for g in truth) > 0.1


def drawn_before_an_update(advantage: str) -> tuple[World, Tensor]:
    """Return a world whose policy has changed since samples were drawn, and their log-probabilities, (P, S, T)."""
    world = world_for(advantage)
    sampled = world.action_logprobs().detach()
    shake(world.policy.model, 0.1)
    return world, sampled


@pytest.mark.parametrize(
    ("estimator", "advantage", "loss"),
    [
        ("regressed", "leave_one_out", "policy_gradient"),
        ("exact", "running_baseline", "policy_gradient"),
        ("k1", "gae", "policy_gradient"),
        ("k1_sequence", "running_baseline", "policy_gradient"),
        ("exact", "running_baseline", "ppo_clip"),
    ],
)
def test_weighted_samples_of_the_policy_before_an_update_have_the_gradient_of_the_current_objective(
    estimator: str, advantage: str, loss: str
) -> None:
    world, sampled = drawn_before_an_update(advantage)
    training = make_training(world, estimator, advantage, loss, ahead=SamplingAhead(world.begin_rollout))
    truth = objective_gradient(world)
    assert distance(expected_gradient(world, training, sampled), truth, factor=-1.0) < 1e-10
    assert distance(expected_gradient(world, training, sampled, corrected=False), truth, factor=-1.0) > 1e-3


def test_a_limit_of_the_weights_biases_the_gradient() -> None:
    world, sampled = drawn_before_an_update("running_baseline")
    bias = []
    for limit in (1.0, 1.1, 100.0):
        ahead = SamplingAhead(world.begin_rollout, limit)
        expected = expected_gradient(world, make_training(world, "exact", "running_baseline", ahead=ahead), sampled)
        bias.append(distance(expected, objective_gradient(world), factor=-1.0))
    assert bias[0] > bias[1] > 1e-4
    assert bias[2] < 1e-10


def test_the_entropy_bonus_counts_the_states_that_an_action_leads_to() -> None:
    world = World()
    expected = expected_gradient(world, make_training(world, "exact", "running_baseline", entropy_coef=0.7))
    assert distance(expected, objective_gradient(world, 0.7), factor=-1.0) < 1e-10
    assert distance(expected, objective_gradient(world), factor=-1.0) > 1e-2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
def test_the_reference_of_an_adapter_is_the_model_without_it(kind: str) -> None:
    world = World(adapter=AdapterConfig(kind=kind, rank=2, virtual_tokens=2), drift=0.3)
    expected = expected_gradient(world, make_training(world, "exact", "running_baseline"))
    truth = objective_gradient(world)
    assert distance(expected, truth, factor=-1.0) < 1e-10
    assert max(g.abs().max() for g in truth) > 0.01


def test_without_the_kl_of_later_states_the_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    whole = objectives.token_rewards
    monkeypatch.setattr(
        "alignpro.objectives.kl.token_rewards", lambda *args: whole(*args[:4], 0 * args[4], *args[5:])
    )  # kl
    expected = expected_gradient(world, make_training(world, "exact", "running_baseline"))
    assert distance(expected, objective_gradient(world), factor=-1.0) > 1e-2


def test_the_gibbs_gradient_is_minus_lambda_times_that_of_the_objective() -> None:
    world = world_for("leave_one_out")
    expected = expected_gradient(world, make_training(world, "exact", "leave_one_out", loss="gibbs"))
    assert distance(expected, objective_gradient(world), factor=-LAMBDA) < 1e-10


@pytest.mark.parametrize("loss", ["policy_gradient", "gibbs"])
def test_the_order_of_a_groups_samples_does_not_matter(loss: str) -> None:
    world = World()
    training = make_training(world, "exact", "leave_one_out", loss)
    experience = credit(world, training, [(0, 9), (9, 0)])
    assert distance(*(gradient_of(training, experience, groups) for groups in ([0, 2], [1, 3]))) < 1e-12


@pytest.mark.parametrize("estimator", get_args(objectives.KLEstimator))
def test_the_first_gradient_of_ppo_is_the_policy_gradient(estimator: str) -> None:
    world = World()
    groups = [(0, 9), (14, 3), (5, 5)]
    gradients = []
    for loss in ("policy_gradient", "ppo_clip"):
        training = make_training(world, estimator, "leave_one_out", loss)
        gradients.append(gradient_of(training, credit(world, training, groups), [1, 3, 5]))
    assert distance(*gradients) < 1e-12
    assert max(g.abs().max() for g in gradients[0]) > 0.1
