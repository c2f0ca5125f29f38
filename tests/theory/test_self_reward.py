"""Calibrated self-reward in worlds small enough to enumerate: its scores, and what exact iterations gain."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from alignpro.objectives.gibbs import gibbs_loss
from alignpro.theory import (
    expected_reward,
    kl_divergence,
    ranks,
    self_reward_iterations,
    sentence_scores,
)

LAMBDA = 0.5
ALPHAS = (0.0, 0.5, 0.9, 1.0)


def world(seed: int = 0, prompts: int = 20, candidates: int = 7) -> tuple[Tensor, Tensor]:
    """log ρ_0 (P, C) and rewards (P, C), independent of each other."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(prompts, candidates, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), torch.rand(prompts, candidates, generator=generator, dtype=torch.float64)


def test_a_rank_is_the_share_of_the_others_below_and_ties_count_half() -> None:
    assert ranks(torch.tensor([3.0, -1.0, 7.0])).tolist() == [0.5, 0.0, 1.0]
    assert ranks(torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]])).tolist() == [[0.75, 0.75, 0.0], [0.5, 0.5, 0.5]]
    assert ranks(torch.tensor([4.0])).tolist() == [0.5]
    assert ranks(torch.tensor([-torch.inf, 0.0, 1.0])).tolist() == [0.0, 0.5, 1.0]


def test_scores_do_not_depend_on_the_units_of_the_scorer() -> None:
    logprob, rewards = world()
    for alpha in ALPHAS:
        scores = sentence_scores(rewards, logprob, alpha)
        assert torch.equal(scores, sentence_scores(torch.exp(9 * rewards) - 4, logprob, alpha))
        assert torch.equal(scores, sentence_scores(rewards, logprob / 3, alpha))
        torch.testing.assert_close(scores.mean(-1), torch.full_like(scores[:, 0], 0.5))


def test_a_score_is_linear_in_alpha_between_likelihood_and_scorer() -> None:
    logprob, rewards = world()
    assert torch.equal(sentence_scores(rewards, logprob, 0.0), ranks(logprob))
    assert torch.equal(sentence_scores(rewards, logprob, 1.0), ranks(rewards))
    between = 0.3 * ranks(rewards) + 0.7 * ranks(logprob)
    torch.testing.assert_close(sentence_scores(rewards, logprob, 0.3), between)
    with pytest.raises(ValueError, match=r"alpha=1.1: expected a number from 0 to 1"):
        sentence_scores(rewards, logprob, 1.1)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_iteration_raises_its_own_scores_by_lambda_times_both_divergences(alpha: float) -> None:
    logprob, rewards = world()
    policies = self_reward_iterations(logprob, rewards, alpha, LAMBDA, 4)
    for before, after in pairwise(policies):
        scores = sentence_scores(rewards, before, alpha)
        gain = expected_reward(after, scores) - expected_reward(before, scores)
        torch.testing.assert_close(gain, LAMBDA * (kl_divergence(after, before) + kl_divergence(before, after)))
        assert (gain > 0).all()


def test_pure_self_reward_sharpens_what_was_likely_and_its_gains_fade() -> None:
    """log ρ_n = log ρ_0 + n s/λ − log Z_n: towards the mode of ρ_0, whatever it is worth."""
    logprob, rewards = world()
    policies = self_reward_iterations(logprob, rewards, 0.0, LAMBDA, 40)
    for n in (1, 2, 7):
        expected = (logprob + n * ranks(logprob) / LAMBDA).log_softmax(-1)
        torch.testing.assert_close(policies[n], expected)
    mode = rewards.gather(-1, logprob.argmax(-1, keepdim=True))[:, 0]
    torch.testing.assert_close(expected_reward(policies[-1], rewards), mode, atol=1e-5, rtol=0)
    values = torch.stack([expected_reward(each, rewards) for each in policies])  # (N + 1, P)
    steps = (values[1:] - values[:-1]).abs().mean(1)
    assert steps[10] < 0.05 * steps[0] and steps[30] < 1e-3 * steps[0]
    assert (mode < values[0]).any()  # to sharpen can cost reward
    entropies = torch.stack([-(each.exp() * each).sum(-1) for each in policies])
    assert (entropies[1:] < entropies[:-1]).all()


def test_the_scorer_alone_leads_to_the_best_candidate() -> None:
    logprob, rewards = world()
    policies = self_reward_iterations(logprob, rewards, 1.0, LAMBDA, 60)
    torch.testing.assert_close(expected_reward(policies[-1], rewards), rewards.amax(-1), atol=1e-4, rtol=0)


def test_more_calibration_reaches_more_reward_where_likelihood_says_nothing_of_it() -> None:
    logprob, rewards = world(prompts=200)
    reached = [
        expected_reward(self_reward_iterations(logprob, rewards, alpha, LAMBDA, 12)[-1], rewards).mean().item()
        for alpha in ALPHAS
    ]
    assert reached == sorted(reached)
    assert abs(reached[0] - 0.5) < 0.05  # the mean of all rewards: the mode's is no better


def test_the_gibbs_loss_of_a_pair_is_that_of_ipo() -> None:
    log_ratios = torch.tensor([0.7, -0.4], dtype=torch.float64)
    loss = gibbs_loss(log_ratios, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.0]), 2, LAMBDA)
    torch.testing.assert_close(loss, 0.25 * (LAMBDA * (log_ratios[0] - log_ratios[1]) - 1.0) ** 2)
