"""Mixtures of prompters, and the dial: by enumeration, and from samples that agree with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignpro.theory import (
    SequenceSpace,
    correction,
    dial,
    enumerate_sequences,
    kl_divergence,
    mirror_descent,
    mixture_gradient,
    mixture_policy,
    mixture_value,
    optimal_policy,
    sampled_mixture,
    total_variation,
)

KL_COEF = 0.4


def make_world(seed: int, prompts: int = 3, prompters: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return log ρ_sft (P, S), rewards (K, P, S) and the optimal prompters log ρ_k (K, P, S) over all sequences."""
    g = torch.Generator().manual_seed(seed)
    space = enumerate_sequences(vocabulary=4, end_token=0, max_length=3)
    reference = torch.stack([space.sequence_logprob(random_policy(space, g)) for _ in range(prompts)])
    rewards = torch.rand(prompters, *reference.shape, generator=g, dtype=torch.float64)
    return reference, rewards, torch.stack([optimal_policy(reference, each, KL_COEF) for each in rewards])


def random_policy(space: SequenceSpace, g: torch.Generator, size: float = 1.0) -> Tensor:
    """Return log ρ(.|s) of every state, (states, V)."""
    noise = torch.randn(len(space.prefixes), space.vocabulary, generator=g, dtype=torch.float64)
    return (size * noise).log_softmax(-1)


def random_weights(seed: int, count: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=g, dtype=torch.float64).mul(2).softmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_convex_at_most_zero_and_zero_at_each_prompter(seed: int) -> None:
    reference, _, prompters = make_world(seed)
    for corner in torch.eye(3, dtype=torch.float64):
        assert mixture_value(reference, prompters, corner).item() == pytest.approx(0.0, abs=1e-12)
    for pair in range(8):
        one, other = random_weights(2 * pair), random_weights(2 * pair + 1)
        ends = [mixture_value(reference, prompters, each) for each in (one, other)]
        middle = mixture_value(reference, prompters, (one + other) / 2)
        assert middle <= (ends[0] + ends[1]) / 2 and max(ends) <= 0


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_value_is_the_mean_log_ratio_under_the_mixture(seed: int) -> None:
    reference, _, prompters = make_world(seed)
    weights = random_weights(seed).requires_grad_()
    (expected,) = torch.autograd.grad(mixture_value(reference, prompters, weights), weights)
    with torch.no_grad():
        torch.testing.assert_close(mixture_gradient(reference, prompters, weights), expected, rtol=0, atol=1e-12)


def test_the_mixture_of_optimal_prompters_is_optimal_for_the_weighted_reward() -> None:
    reference, rewards, prompters = make_world(0)
    weights = random_weights(0)
    mixed = mixture_policy(reference, prompters, weights)
    best = optimal_policy(reference, torch.tensordot(weights, rewards, dims=1), KL_COEF)
    torch.testing.assert_close(mixed, best, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0, 1.3])
def test_the_dial_is_optimal_for_its_own_kl_coefficient(strength: float) -> None:
    reference, rewards, prompters = make_world(1, prompters=1)
    turned = dial(reference, prompters[0], strength)
    best = optimal_policy(reference, rewards[0], KL_COEF / strength) if strength else reference
    torch.testing.assert_close(turned, best, rtol=0, atol=1e-12)


def test_rewrites_that_are_impossible_stay_so() -> None:
    reference, _, prompters = make_world(2)
    padded = torch.cat([reference, torch.full((3, 2), -torch.inf)], dim=1)
    more = torch.cat([prompters, torch.full((3, 3, 2), -torch.inf)], dim=2)
    weights = random_weights(2)
    mixed = mixture_policy(padded, more, weights)
    torch.testing.assert_close(mixed[:, :-2], mixture_policy(reference, prompters, weights))
    assert (mixed[:, -2:] == -torch.inf).all()
    torch.testing.assert_close(mixture_gradient(padded, more, weights), mixture_gradient(reference, prompters, weights))


def test_what_a_prompter_cannot_write_is_impossible_unless_its_weight_is_zero() -> None:
    reference, _, prompters = make_world(2, prompters=1)
    prompter = prompters[0].clone()
    prompter[:, 0] = -torch.inf
    prompter = prompter.log_softmax(-1)
    torch.testing.assert_close(dial(reference, prompter, 0.0), reference)
    for strength in (0.5, 1.0):
        turned = dial(reference, prompter, strength)
        assert (turned[:, 0] == -torch.inf).all()
        torch.testing.assert_close(turned.exp().sum(-1), torch.ones(len(turned), dtype=turned.dtype))
        gradient = mixture_gradient(reference, prompter.unsqueeze(0), torch.tensor([strength], dtype=reference.dtype))
        assert gradient.isfinite().all()


def draw_log_ratios(reference: Tensor, prompters: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Return g_k of ``count`` rewrites of ρ_sft to each prompt, (P, m, K)."""
    chosen = torch.multinomial(reference.exp(), count, replacement=True, generator=g)  # (P, m)
    return (prompters - reference).gather(2, chosen.expand(len(prompters), -1, -1)).permute(1, 2, 0)


def test_sampled_estimates_approach_the_exact_ones() -> None:
    reference, _, prompters = make_world(3)
    weights = random_weights(3)
    log_ratios = draw_log_ratios(reference, prompters, 50_000, torch.Generator().manual_seed(0))
    sampled = sampled_mixture(log_ratios, weights)
    torch.testing.assert_close(sampled.value, mixture_value(reference, prompters, weights), rtol=0, atol=5e-3)
    torch.testing.assert_close(sampled.gradient, mixture_gradient(reference, prompters, weights), rtol=0, atol=1e-2)
    mixed = mixture_policy(reference, prompters, weights)
    expected = 1 / (2 * mixed - reference).exp().sum(-1)  # N divided by 1 + the χ² divergence
    torch.testing.assert_close(sampled.effective_sample_size / 50_000, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("seed", range(2))
def test_mirror_descent_comes_within_a_thousandth_of_the_least_value(seed: int) -> None:
    """Each step draws new rewrites; the least value of the enumerated F is that on a grid of 1 / 30."""
    reference, _, prompters = make_world(seed)
    g = torch.Generator().manual_seed(seed)
    found = mirror_descent(lambda step: draw_log_ratios(reference, prompters, 64, g), 3)
    assert found.sum().item() == pytest.approx(1.0) and (found >= 0).all()
    grid = [(i / 30, j / 30, 1 - (i + j) / 30) for i in range(31) for j in range(31 - i)]
    least = min(mixture_value(reference, prompters, torch.tensor(each, dtype=torch.float64)).item() for each in grid)
    assert mixture_value(reference, prompters, found).item() == pytest.approx(least, abs=1e-3)


def test_at_the_least_value_no_prompter_that_counts_is_better_off_than_another() -> None:
    """The max-min mixture: normalised rewards E_{ρ_w} g_k are equal where w_k > 0, and no less where w_k = 0."""
    reference, _, prompters = make_world(0)
    g = torch.Generator().manual_seed(0)
    found = mirror_descent(lambda step: draw_log_ratios(reference, prompters, 1000, g), 3)
    rewards = mixture_gradient(reference, prompters, found)
    counted = found > 0.02
    assert counted.sum() >= 2
    assert (rewards[counted].max() - rewards[counted].min()).item() < 0.02
    assert (rewards[~counted] > rewards[counted].min() - 0.02).all()


def far_prompters(prompts: int, m: int, shares: list[int]) -> tuple[Tensor, Tensor]:
    """g_k of two prompters that write almost always what ρ_sft writes once in 200 times: of m rewrites to each prompt, drawn
    in these shares by ρ_sft and both; with the shares, of sum 1."""
    reference = torch.full((200,), -math.log(200), dtype=torch.float64)
    prompters = torch.full((2, 200), 0.01 / 199, dtype=torch.float64)
    prompters[0, 0] = prompters[1, 1] = 0.99
    g = torch.Generator().manual_seed(0)
    laws = [reference.exp(), *prompters]
    counts = [m * share // sum(shares) for share in shares]
    drawn = [
        torch.multinomial(law.expand(prompts, -1), count, replacement=True, generator=g)
        for law, count in zip(laws, counts, strict=True)
        if count
    ]
    ratios = (prompters.log() - reference).T[torch.cat(drawn, 1)]  # (P, m, K)
    return ratios, torch.tensor(counts, dtype=torch.float64) / m


def test_rewrites_of_the_prompters_hold_what_those_of_the_reference_lack() -> None:
    """At each prompter alone F is 0, and by symmetry the least value is at equal weights."""
    alone = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ratios, shares = far_prompters(16, 15, [1, 1, 1])
    balanced = sampled_mixture(ratios, alone, shares)
    assert balanced.value.item() == pytest.approx(0.0, abs=0.1)
    assert balanced.effective_sample_size.min() > 4  # of 15: those of the prompter itself
    assert mirror_descent(lambda step: ratios, 2, shares=shares).tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    lacking, _ = far_prompters(16, 15, [1, 0, 0])
    assert sampled_mixture(lacking, alone).value.item() < -1.5
    assert max(mirror_descent(lambda step: lacking, 2).tolist()) > 0.7  # where the chance of the draws has led


@pytest.mark.parametrize("scale", [0.3, 3.0, 20.0, 60.0])
def test_the_least_value_is_found_however_far_the_prompters_are_apart(scale: float) -> None:
    """Steps of a fixed size went from corner to corner where log ratios are tens of nats."""
    g = torch.Generator().manual_seed(0)
    reference = torch.randn(48, 100, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(2, 48, 100, generator=g, dtype=torch.float64) * torch.tensor([[[1.0]], [[2.0]]])
    prompters = (reference + scale * rewards).log_softmax(-1)
    laws = torch.stack([reference, *prompters]).exp().mean(0)
    chosen = torch.multinomial(laws, 15, replacement=True, generator=g)  # a third of the draws by each
    ratios = (prompters - reference).gather(2, chosen.expand(2, -1, -1)).permute(1, 2, 0)
    shares = torch.full((3,), 1 / 3, dtype=torch.float64)
    found = mirror_descent(lambda step: ratios[torch.randint(48, (16,), generator=g)], 2, shares=shares)
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    least = min(sampled_mixture(ratios, torch.stack([w, 1 - w]), shares).value.item() for w in grid)
    assert sampled_mixture(ratios, found, shares).value.item() == pytest.approx(least, abs=5e-3)


def test_prompters_that_are_alike_keep_equal_weights() -> None:
    assert mirror_descent(lambda step: torch.ones(2, 4, 3), 3).tolist() == pytest.approx([1 / 3] * 3)


def test_mirror_descent_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="steps=1"):
        mirror_descent(lambda step: torch.zeros(1, 2, 2), 2, steps=1)
    with pytest.raises(ValueError, match="a log ratio of step 0 is not finite"):
        mirror_descent(lambda step: torch.full((1, 2, 2), torch.inf), 2)


def tokenwise_world(seed: int) -> tuple[Tensor, Tensor]:
    """Return the mixture of two prompters over all sequences, log ρ_w, and that token by token, log q, (S,) each."""
    g = torch.Generator().manual_seed(seed)
    space = enumerate_sequences(vocabulary=4, end_token=0, max_length=3)
    reference, one, other = (random_policy(space, g, 1.5) for _ in range(3))
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    tokenwise = mixture_policy(reference, torch.stack([one, other]), weights)  # state by state
    whole = [space.sequence_logprob(each) for each in (reference, one, other)]
    return mixture_policy(whole[0], torch.stack(whole[1:]), weights), space.sequence_logprob(tokenwise)


@pytest.mark.parametrize("seed", range(2))
def test_corrected_draws_of_the_tokenwise_mixture_are_those_of_the_mixture(seed: int) -> None:
    """Of 6,000 groups of 64 draws, one each is kept; its law is estimated by the weights, without the last draw's noise."""
    exact, tokenwise = tokenwise_world(seed)
    g = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(tokenwise.exp(), 6_000 * 64, replacement=True, generator=g).view(-1, 64)
    corrected = correction(exact[chosen], tokenwise[chosen])
    law = torch.zeros_like(exact).index_add_(0, chosen.flatten(), corrected.weights.flatten() / 6_000)
    assert total_variation(exact, tokenwise) > 0.05
    assert total_variation(exact, law.log()) < 0.02
    # Both distances, from one large group.
    gap = correction(exact[chosen.flatten()], tokenwise[chosen.flatten()])
    assert gap.total_variation.item() == pytest.approx(total_variation(exact, tokenwise).item(), abs=5e-3)
    assert gap.kl.item() == pytest.approx(kl_divergence(tokenwise, exact).item(), abs=5e-3)
    relative = gap.effective_sample_size / chosen.numel()
    assert relative.item() == pytest.approx(1 / (2 * exact - tokenwise).exp().sum().item(), rel=0.05)


def test_draws_of_the_distribution_itself_keep_equal_weights() -> None:
    log_density = torch.tensor([[-1.0, -2.0, -2.0, -5.0]])
    same = correction(log_density + 7.0, log_density)
    torch.testing.assert_close(same.weights, torch.full((1, 4), 0.25))
    torch.testing.assert_close(same.effective_sample_size, torch.tensor([4.0]))
    assert same.kl.abs().item() < 1e-6 and same.total_variation.item() < 1e-6


def test_draws_that_cannot_be_of_the_proposal_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be of the proposal"):
        correction(torch.zeros(2), torch.tensor([0.0, -torch.inf]))
    with pytest.raises(ValueError, match=r"log_density has shape \(2,\), log_proposal \(3,\)"):
        correction(torch.zeros(2), torch.zeros(3))
