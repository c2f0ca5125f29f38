import pytest
import torch

from alignpro.errors import ConfigError
from alignpro.objectives import LeaveOneOut, SampledReturns, gibbs_loss
from alignpro.theory import optimal_policy

LAMBDA = 0.4


def make_group(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logprob, reference, scores = (torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(3))
    return (logprob - 5).requires_grad_(), reference - 5, scores


def test_gradient_is_minus_lambda_times_the_leave_one_out_ascent_direction() -> None:
    logprob, reference, scores = make_group()
    (gibbs,) = torch.autograd.grad(gibbs_loss(logprob, reference, scores, 4, LAMBDA), logprob)
    # RLOO on whole sequences, with the sampled KL in the reward.
    rewards = scores - LAMBDA * (logprob.detach() - reference)
    mask = torch.ones(8, 1, dtype=torch.bool)
    returns = rewards.unsqueeze(-1)
    advantages = LeaveOneOut()(SampledReturns(returns, returns, mask, rewards, 4)).squeeze(-1)
    ascent = advantages / 8  # ∂/∂logprob of the mean of advantage · logprob
    torch.testing.assert_close(gibbs, -LAMBDA * ascent, rtol=0, atol=1e-14)


def test_the_optimum_has_zero_loss_for_any_samples() -> None:
    g = torch.Generator().manual_seed(1)
    reference = torch.randn(10, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(10, generator=g, dtype=torch.float64)
    best = optimal_policy(reference, rewards, LAMBDA)
    sampled = torch.tensor([0, 3, 3, 9])  # arbitrary rewrites, with repetitions
    assert gibbs_loss(best[sampled], reference[sampled], rewards[sampled], 4, LAMBDA).item() < 1e-28
    worse = gibbs_loss(reference[sampled], reference[sampled], rewards[sampled], 4, LAMBDA)
    torch.testing.assert_close(worse, rewards[sampled].var() / 2)


def test_whole_groups_average_to_the_batch() -> None:
    logprob, reference, scores = make_group()
    whole = gibbs_loss(logprob, reference, scores, 4, LAMBDA)
    halves = [gibbs_loss(logprob[r], reference[r], scores[r], 4, LAMBDA) for r in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_descent_reaches_the_optimum_off_policy() -> None:
    g = torch.Generator().manual_seed(2)
    reference = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(6, generator=g, dtype=torch.float64)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # Every candidate once: uniform sampling, not the policy's.
        loss = gibbs_loss(logits.log_softmax(-1), reference, rewards, 6, LAMBDA)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = optimal_policy(reference, rewards, LAMBDA).exp()
    torch.testing.assert_close(logits.detach().softmax(-1), best, rtol=0, atol=1e-6)


def test_bad_arguments_say_what_to_do() -> None:
    logprob, reference, scores = make_group()
    with pytest.raises(ConfigError, match="use at least 2"):
        gibbs_loss(logprob, reference, scores, 1, LAMBDA)
    with pytest.raises(ConfigError, match="needs a positive λ"):
        gibbs_loss(logprob, reference, scores, 4, 0.0)
    with pytest.raises(ValueError, match="not a whole number of groups"):
        gibbs_loss(logprob, reference, scores, 3, LAMBDA)
    with pytest.raises(ValueError, match="expected"):
        gibbs_loss(logprob, reference[:4], scores, 4, LAMBDA)
