import math

import pytest
import torch

from alignpro.errors import ConfigError
from alignpro.objectives import best_of_kl, best_of_weights, gibbs_resample
from alignpro.theory import kl_divergence, log_partition, optimal_policy

LAMBDA = 0.5


def test_weights_are_the_softmax_of_reward_over_lambda() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.5]])
    result = gibbs_resample(rewards, LAMBDA)
    expected = torch.tensor([1.0, math.e**2, math.e])
    torch.testing.assert_close(result.weights[0], expected / expected.sum())
    assert result.value.item() == pytest.approx(LAMBDA * math.log(expected.mean().item()))
    torch.testing.assert_close(result.reward, (result.weights * rewards).sum(-1))


def test_effective_sample_size_and_kl_run_between_their_limits() -> None:
    equal = gibbs_resample(torch.full((8,), 3.0), LAMBDA)
    assert equal.effective_sample_size.item() == pytest.approx(8.0) and equal.kl.item() == pytest.approx(0.0, abs=1e-6)
    assert equal.value.item() == pytest.approx(3.0)
    one = gibbs_resample(torch.tensor([1e4] + [0.0] * 7), LAMBDA)  # no overflow either
    assert one.effective_sample_size.item() == pytest.approx(1.0) and one.kl.item() == pytest.approx(math.log(8))


def test_the_estimate_of_log_z_is_too_low_on_average_and_less_so_with_more_samples() -> None:
    reference = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    rewards = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    truth = LAMBDA * log_partition(reference.log(), rewards, LAMBDA).item()
    means = []
    for count in (1, 2, 6):
        samples = torch.cartesian_prod(*[torch.arange(3)] * count).view(-1, count)  # every draw of N, weighted exactly
        probability = reference[samples].prod(-1)
        means.append((probability * gibbs_resample(rewards[samples], LAMBDA).value).sum().item())
    assert means[0] < means[1] < means[2] < truth


def test_many_samples_approach_the_optimal_policy() -> None:
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(5, generator=g, dtype=torch.float64)
    samples = torch.multinomial(reference.exp(), 100_000, replacement=True, generator=g)
    result = gibbs_resample(rewards[samples], LAMBDA)
    best = optimal_policy(reference, rewards, LAMBDA)
    kept = torch.zeros(5, dtype=torch.float64).index_add(0, samples, result.weights)
    torch.testing.assert_close(kept, best.exp(), rtol=0, atol=0.01)
    assert result.kl.item() == pytest.approx(kl_divergence(best, reference).item(), abs=0.01)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="positive λ"):
        gibbs_resample(torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="no rewrites"):
        gibbs_resample(torch.zeros(2, 0), LAMBDA)


@pytest.mark.parametrize("rewards", [[0.0, 0.5, 2.0], [1.0, 1.0, 0.0]])
def test_the_kl_of_best_of_n_is_not_above_its_bound(rewards: list[float]) -> None:
    reference = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    of_each = torch.tensor(rewards, dtype=torch.float64)
    count = 4
    samples = torch.cartesian_prod(*[torch.arange(3)] * count)  # every draw of N, weighted exactly
    probability = reference[samples].prod(-1)
    weights = best_of_weights(of_each[samples])
    kept = torch.stack([(probability[:, None] * weights * (samples == i)).sum() for i in range(3)])
    assert kept.sum().item() == pytest.approx(1.0)
    exact = torch.xlogy(kept, kept / reference).sum().item()
    by_ties = (probability * (math.log(count) + torch.xlogy(weights, weights).sum(-1))).sum().item()
    assert exact <= min(by_ties, math.log(count) - (count - 1) / count) + 1e-12


def test_the_best_of_n_share_their_weight_where_they_are_equal() -> None:
    weights = best_of_weights(torch.tensor([[1.0, 0.0, 1.0, 0.5]]))
    assert weights.tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert best_of_kl(weights).item() == pytest.approx(min(math.log(2), math.log(4) - 0.75))
    assert best_of_kl(torch.full((2, 4), 0.25)).tolist() == pytest.approx([0.0, 0.0])
