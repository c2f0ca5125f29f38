"""Exact bias and variance at a policy, and how many samples training needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignpro import objectives
from benchmarks.estimators.gradient import Case, Samples, ascent, moments
from benchmarks.estimators.world import World


@dataclass(frozen=True)
class Moments:
    """An estimate's distribution at one policy, over all groups of two samples."""

    bias: float
    """|E estimate − ∇J| / |∇J|."""
    cosine: float
    """Between E estimate and ∇J."""
    variance: float
    """Sum of the variances of all elements of the gradient."""


def exact_moments(world: World, policy: Tensor, case: Case, drawn_from: Tensor | None = None) -> Moments:
    """Sum over all pairs of sequences.

    Args:
        world: A world of one prompt.
        policy: (1, n, V) at which the gradient is estimated.
        case: The estimator.
        drawn_from: (1, n, V): the policy that drew the pairs, for a later update of ``ppo_clip``.
    """
    behaviour = policy if drawn_from is None else drawn_from
    probability = world.sequence_logprob(behaviour)[0].exp()  # (S,)
    pairs = torch.tensor(list(itertools.product(range(len(probability)), repeat=2)))
    weight = probability[pairs].prod(-1)[:, None]  # (S², 1)
    penalty, advantage = case.penalty(world.kl_coef), objectives.ADVANTAGES[case.advantage]()
    mean_score, mean_logratio, covariance, variance = _score_moments(world, behaviour)
    penalty.update(0.0, 0, covariance, variance)  # a regression over many earlier samples of the policy that drew
    advantage.update(mean_score - world.kl_coef * mean_logratio)
    samples = Samples(torch.zeros(len(pairs), dtype=torch.int64), pairs)
    estimates = ascent(world, policy, samples, case, penalty, advantage, drawn_from).flatten(1)
    mean = (weight * estimates).sum(0)
    truth = objective_gradient(world, policy).flatten()
    return Moments(
        bias=((mean - truth).norm() / truth.norm()).item(),
        cosine=torch.cosine_similarity(mean, truth, dim=0).item(),
        variance=(weight * (estimates - mean).square()).sum().item(),
    )


def objective_gradient(world: World, policy: Tensor) -> Tensor:
    """∇J with respect to the logits of every state, (P, n, V)."""
    logits = policy.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(world.objective(logits.log_softmax(-1)).sum(), logits)
    return gradient


def updated(world: World, policy: Tensor, nats: float) -> Tensor:
    """The policy after a step along ∇J to KL(policy ‖ updated) = ``nats``, (1, n, V)."""
    gradient, logprob = objective_gradient(world, policy), world.sequence_logprob(policy)
    low, high = 0.0, 1e4
    for _ in range(60):  # bisection of the step's length
        step = (low + high) / 2
        later = (policy + step * gradient).log_softmax(-1)
        moved = (logprob.exp() * (logprob - world.sequence_logprob(later))).sum().item()
        low, high = (step, high) if moved < nats else (low, step)
    return later


def _score_moments(world: World, policy: Tensor) -> tuple[float, float, float, float]:
    """E R, E L, cov(R, L) and var L under a policy."""
    logprob = world.sequence_logprob(policy)[0]
    probability, scores, logratio = logprob.exp(), world.rewards[0], logprob - world.reference_logprob[0]
    mean_score, mean_logratio = (probability * scores).sum(), (probability * logratio).sum()
    centred = probability * (logratio - mean_logratio)
    values = (
        mean_score,
        mean_logratio,
        (centred * (scores - mean_score)).sum(),
        (centred * (logratio - mean_logratio)).sum(),
    )
    return tuple(x.item() for x in values)  # type: ignore[return-value]


@dataclass(frozen=True)
class Training:
    """Runs of gradient ascent at one learning rate."""

    samples: float | None
    """Samples per prompt until J* − J is at most 5 % of J* − J(ρ_sft), over all prompts; None if it never is."""
    remaining: float
    """Mean (J* − J) / (J* − J(ρ_sft)) over the last tenth of the steps."""
    kl_overshoot: float
    """The largest KL on the way, over that of ρ*."""


def train(world: World, case: Case, rate: float, *, group: int, steps: int, seed: int) -> Training:
    """Run gradient ascent on the logits of every state with Adam (β = 0.9, 0.95), as training does.

    Args:
        world: The prompts, all of which take part in each step.
        case: The estimator.
        rate: Learning rate.
        group: K.
        steps: Number of updates.
        seed: Of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate, betas=(0.9, 0.95), maximize=True)
    penalty, advantage = case.penalty(world.kl_coef), objectives.ADVANTAGES[case.advantage]()
    best, start = world.optimum().mean(), world.objective(world.reference).mean()
    optimal_kl = world.kl(world.tilted(1.0)).mean()
    prompts = torch.arange(len(world.rewards))
    remaining: list[float] = []
    largest_kl = 0.0
    for _ in range(steps):
        policy = logits.detach().log_softmax(-1)
        remaining.append(((best - world.objective(policy).mean()) / (best - start)).item())
        largest_kl = max(largest_kl, world.kl(policy).mean().item())
        probability = world.sequence_logprob(policy).exp()
        samples = Samples(prompts, torch.multinomial(probability, group, replacement=True, generator=generator))
        logits.grad = ascent(world, policy, samples, case, penalty, advantage)
        optimizer.step()
        penalty.update(0.0, samples.sequence.numel(), *moments(world, policy, samples))
        scores = world.rewards[prompts[:, None], samples.sequence].mean().item()
        advantage.update(scores - world.kl_coef * world.kl(policy).mean().item())
    hit = next((step for step, left in enumerate(remaining) if left <= 0.05), None)
    last = remaining[-max(1, steps // 10) :]
    return Training(
        samples=None if hit is None else float(hit * group),
        remaining=sum(last) / len(last),
        kl_overshoot=largest_kl / optimal_kl.item(),
    )


def best_training(
    world: World, case: Case, rates: Sequence[float], *, group: int, steps: int, seed: int
) -> dict[str, Any]:
    """Train at each rate, and return the one that needs the fewest samples (if none arrives, the one that comes closest)."""
    runs = {rate: train(world, case, rate, group=group, steps=steps, seed=seed) for rate in rates}

    def rank(rate: float) -> tuple[float, float]:
        samples = runs[rate].samples
        return math.inf if samples is None else samples, runs[rate].remaining

    rate = min(runs, key=rank)
    return {"rate": rate, **vars(runs[rate])}
