"""Calibrated self-reward: a policy that learns from its own likelihood, corrected by an external scorer.

Candidates are grown sentence by sentence. With n sentences to choose from at a place, the score of sentence i is

    s_i = α · rank of e_i + (1 − α) · rank of log ρ(sentence i | what stands before it)

e_i what the external scorer gives, and a rank the share of the other n − 1 that are below, ties counted half: so both parts have
one scale, whatever the unit of e. The sum over a candidate's sentences, divided by their number, orders candidates.

An iteration trains for these scores as rewards, from the policy before it, ρ_i, with the KL to it:

    ρ_{i+1} ∝ ρ_i exp(s/λ),   E_{ρ_{i+1}} s − E_{ρ_i} s = λ [ KL(ρ_{i+1} ‖ ρ_i) + KL(ρ_i ‖ ρ_{i+1}) ] ≥ 0

With α = 0 the order of likelihoods, and so s, never changes: log ρ_n = log ρ_0 + n s/λ − log Z_n tends to the mode of ρ_0,
whatever that is worth, and what an iteration gains goes to 0. With α = 1, s does not change either: the limit is the best by e.

The last dimension indexes sentences or candidates. Source: calibrated self-rewarding (Zhou et al., 2024, arXiv 2405.14622),
whose external scorer is of images; here it is any number, such as the reward of the target's responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro.theory.closed_form import optimal_policy


def ranks(values: Tensor) -> Tensor:
    """The share of the other values that are below, ties counted half: (..., n) in [0, 1]; ½ if n = 1.

    Args:
        values: (..., n), not NaN.
    """
    count = values.shape[-1]
    if count == 1:
        return torch.full_like(values, 0.5, dtype=torch.float64)
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    below = (one > other).sum(-1).double()
    tied = (one == other).sum(-1).double() - 1.0  # every value equals itself
    return (below + 0.5 * tied) / (count - 1)


def sentence_scores(external: Tensor, own_logprob: Tensor, alpha: float) -> Tensor:
    """The calibrated score of each of n sentences, (..., n) float64 in [0, 1].

    Args:
        external: (..., n) what the external scorer gives; of no matter if ``alpha`` is 0.
        own_logprob: (..., n) log-probability of each whole sentence under the policy, nats.
        alpha: α in [0, 1].

    Raises:
        ValueError: ``alpha`` is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha}: expected a number from 0 to 1")
    return alpha * ranks(external) + (1.0 - alpha) * ranks(own_logprob)


def self_reward_iterations(
    logprob: Tensor, external: Tensor, alpha: float, kl_coef: float, iterations: int
) -> list[Tensor]:
    """The policies ρ_0, ρ_1, … of exact iterations, each optimal for its scores, over candidates of one sentence.

    Args:
        logprob: (..., C) log ρ_0, normalised, finite.
        external: (..., C) what the external scorer gives.
        alpha: α in [0, 1].
        kl_coef: λ > 0.
        iterations: How many.

    Returns:
        ``iterations`` + 1 tensors (..., C) of log-probabilities.

    Raises:
        ConfigError: λ ≤ 0.
        ValueError: ``alpha`` is outside [0, 1].
    """
    policies = [logprob]
    for _ in range(iterations):
        scores = sentence_scores(external, policies[-1], alpha)
        policies.append(optimal_policy(policies[-1], scores, kl_coef))
    return policies
