"""The identities of the closed form, exact for finite candidate sets."""

import pytest
import torch

from alignpro.errors import ConfigError
from alignpro.theory import (
    expected_reward,
    kl_divergence,
    log_partition,
    objective,
    optimal_policy,
    total_variation,
    tv_from_logprobs,
)

LAMBDAS = [0.05, 0.7, 10.0]


def make_problem(prompts: int = 5, candidates: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log ρ, log ρ_sft and R, (X, C) each; the last prompt has fewer candidates."""
    g = torch.Generator().manual_seed(0)
    logits, reference, rewards = (torch.randn(prompts, candidates, generator=g, dtype=torch.float64) for _ in range(3))
    for padded in (logits, reference):
        padded[-1, -2:] = -torch.inf
    return logits.log_softmax(-1), reference.log_softmax(-1), rewards


@pytest.mark.parametrize("kl_coef", LAMBDAS)
def test_the_optimum_is_worth_lambda_log_z(kl_coef: float) -> None:
    _, reference, rewards = make_problem()
    best = optimal_policy(reference, rewards, kl_coef)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    value = objective(best, reference, rewards, kl_coef)
    torch.testing.assert_close(value, kl_coef * log_partition(reference, rewards, kl_coef), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kl_coef", LAMBDAS)
def test_regret_is_lambda_times_the_kl_to_the_optimum(kl_coef: float) -> None:
    prompter, reference, rewards = make_problem()
    best = optimal_policy(reference, rewards, kl_coef)
    regret = objective(best, reference, rewards, kl_coef) - objective(prompter, reference, rewards, kl_coef)
    torch.testing.assert_close(regret, kl_coef * kl_divergence(prompter, best), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kl_coef", LAMBDAS)
def test_gain_over_the_reference_is_lambda_times_both_divergences(kl_coef: float) -> None:
    _, reference, rewards = make_problem()
    best = optimal_policy(reference, rewards, kl_coef)
    gain = expected_reward(best, rewards) - expected_reward(reference, rewards)
    both = kl_divergence(best, reference) + kl_divergence(reference, best)
    torch.testing.assert_close(gain, kl_coef * both, rtol=0, atol=1e-12)


def test_gradient_of_the_objective_vanishes_at_the_optimum_only() -> None:
    _, reference, rewards = (x[:1] for x in make_problem())
    best = optimal_policy(reference, rewards, 0.7).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(best.log_softmax(-1), reference, rewards, 0.7).sum(), best)
    assert gradient.abs().max() < 1e-14
    start = reference.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(start.log_softmax(-1), reference, rewards, 0.7).sum(), start)
    assert gradient.abs().max() > 1e-2


def test_without_kl_the_objective_is_the_reward_and_there_is_no_closed_form() -> None:
    prompter, reference, rewards = make_problem()
    torch.testing.assert_close(objective(prompter, reference, rewards, 0.0), expected_reward(prompter, rewards))
    with pytest.raises(ConfigError, match="positive KL coefficient"):
        optimal_policy(reference, rewards, 0.0)


def test_divergences_agree_with_torch_and_mark_impossible_outcomes() -> None:
    p, q, _ = (x[:4] for x in make_problem())
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    certain = torch.tensor([0.0, -torch.inf])
    even = torch.tensor([0.5, 0.5]).log()
    assert kl_divergence(certain, even).item() == pytest.approx(0.6931, abs=1e-4)
    assert kl_divergence(even, certain).item() == float("inf")
    assert total_variation(certain, even).item() == pytest.approx(0.5)
    assert total_variation(certain, certain.flip(0)).item() == 1.0


def test_sampled_total_variation_is_unbiased_in_both_directions() -> None:
    p, q, _ = make_problem()
    for left, right in ((p, q), (q, p)):
        outcomes = left > -torch.inf
        terms = tv_from_logprobs(left.masked_fill(~outcomes, 0.0), right.masked_fill(~outcomes, 0.0))
        expectation = torch.where(outcomes, left.exp() * terms, 0.0).sum(-1)  # over every outcome: the exact mean
        torch.testing.assert_close(expectation, total_variation(p, q), rtol=0, atol=1e-14)
        assert (terms >= 0).all() and (terms <= 1).all()


def test_sampled_total_variation_refuses_samples_that_p_cannot_draw() -> None:
    assert tv_from_logprobs(torch.tensor([-1.0]), torch.tensor([-torch.inf])).item() == 1.0
    with pytest.raises(ValueError, match="cannot have been drawn from p"):
        tv_from_logprobs(torch.tensor([-torch.inf]), torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="p_logprob has shape"):
        tv_from_logprobs(torch.zeros(2), torch.zeros(3))
