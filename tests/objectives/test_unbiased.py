"""The expected training gradient, summed over every sequence (and every pair of sequences), equals ∇J to 1e-10.

The policy is tabular and in float64: a hidden vector for each prefix, and a head. The estimate is computed as in training:
token statistics, rewards, returns, advantages, coefficients, `policy_loss`. The true gradient is autograd of J, an exact
sum over all sequences.
"""

from collections.abc import Callable
from functools import cached_property
from typing import get_args

import pytest
import torch
from torch import Tensor

from alignpro import objectives as obj
from alignpro.theory import enumerate_sequences, exact_gradient, exact_objective, expected_gradient
from alignpro.theory.divergences import kl_divergence
from alignpro_kernels import linear_logprob, policy_loss

LAMBDA = 0.3


class Tabular:
    """Policy, reference and scores over all sequences of a small vocabulary."""

    def __init__(self, vocabulary: int = 3, max_length: int = 3) -> None:
        g = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.space = enumerate_sequences(vocabulary, end_token=0, max_length=max_length)
        states, width = len(self.space.prefixes), 4
        self.hidden = randn(states, width).requires_grad_()
        self.weight = randn(vocabulary, width).requires_grad_()
        self.bias = randn(vocabulary).requires_grad_()
        self.ref_hidden, self.ref_weight = randn(states, width), randn(vocabulary, width)
        self.options = {"temperature": 0.8, "softcap": 4.0}
        self.scores = randn(len(self.space.tokens))
        self.values = randn(states)  # an untrained critic

    @property
    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    @property
    def actions(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.space.mask, self.space.tokens, self.space.state

    @cached_property
    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return KL, log-ratio and the reference's log-probability of every action of every sequence, (S, T) each."""
        mask, tokens, state = self.actions
        head = {"bias": self.bias, **self.options}
        reference = {"ref_hidden": self.ref_hidden[state], "ref_weight": self.ref_weight}
        stats = linear_logprob(self.hidden[state], self.weight, tokens, **head, **reference)
        ref_logprob = linear_logprob(self.ref_hidden[state], self.ref_weight, tokens, **self.options).logprob
        beyond = torch.full_like(ref_logprob, torch.nan)  # values after a sequence's end must not be read
        return tuple(torch.where(mask, x, beyond) for x in (stats.kl, stats.logprob - ref_logprob, ref_logprob))

    def next_logprob(self) -> Tensor:
        """(states, V), differentiable."""
        z = 4.0 * torch.tanh((self.hidden @ self.weight.T + self.bias) / 4.0) / 0.8
        return z.log_softmax(-1)

    def reference_next_logprob(self) -> Tensor:
        return (4.0 * torch.tanh(self.ref_hidden @ self.ref_weight.T / 4.0) / 0.8).log_softmax(-1)

    def sequence_logprobs(self) -> tuple[Tensor, Tensor]:
        logprob = self.space.sequence_logprob(self.next_logprob())
        return logprob, self.space.sequence_logprob(self.reference_next_logprob())

    def gradient(self) -> list[Tensor]:
        """∇J."""
        return exact_gradient(exact_objective(*self.sequence_logprobs(), self.scores, LAMBDA), self.parameters)


def make(advantage: str, gae_lambda: float = 1.0) -> obj.Advantage:
    return obj.GAE(gae_lambda) if advantage == "gae" else obj.ADVANTAGES[advantage]()


def estimate(
    world: Tabular,
    rows: Tensor,
    estimator: str,
    advantage: str,
    *,
    future_kl: bool = True,
    gae_lambda: float = 1.0,
    share: float = 0.4,
    entropy_coef: float = 0.0,
) -> list[Tensor]:
    """Return −∇ of the loss of one group of sampled sequences, as training computes it."""
    mask, tokens, state, kl, logratio, ref_logprob = (x[rows] for x in (*world.actions, *world.statistics))
    scores = world.scores[rows]
    actions = {"hidden": world.hidden[state[mask]], "weight": world.weight, "target": tokens[mask]}
    head = {"bias": world.bias, **world.options}
    reference = {"ref_hidden": world.ref_hidden[state[mask]], "ref_weight": world.ref_weight}
    penalty = {"logratio": logratio, "sampled_share": share}
    rewards = obj.token_rewards(scores, mask, LAMBDA, estimator, kl=kl if future_kl else 0 * kl, **penalty)
    final = obj.final_return(scores, mask, LAMBDA, estimator, **penalty)
    entropy = -(world.next_logprob().exp() * world.next_logprob()).sum(-1)[state]
    rewards = rewards + obj.entropy_rewards(entropy, mask, entropy_coef)
    returns = obj.returns_to_go(rewards, mask)
    baseline = make(advantage, gae_lambda)
    baseline.update(0.7)
    sampled = obj.SampledReturns(rewards, returns, mask, scores, len(rows), world.values[state], final)
    advantages, weights = baseline(sampled), baseline.weights(sampled)
    scale = 1 / obj.loss_count(mask, "sequence")

    batch = obj.PolicyGradientBatch(
        advantages=advantages[mask],
        scale=scale if weights is None else (scale * weights)[:, None].expand_as(mask)[mask],
        kl_coef=LAMBDA,
        kl_estimator=estimator,
        reference_logprob=ref_logprob[mask],
        entropy_coef=entropy_coef,
        sampled_share=share,
    )
    coefficients = obj.PolicyGradient().coefficients(batch)
    out = policy_loss(coefficients=coefficients, entropy=entropy_coef > 0, **actions, **head, **reference)
    return [-g for g in torch.autograd.grad(out.loss, world.parameters)]


def expectation(world: Tabular, size: int, gradient: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    return expected_gradient(world.sequence_logprobs()[0], size, gradient)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


UNBIASED = [(e, a) for e in get_args(obj.KLEstimator) for a in obj.ADVANTAGES if obj.is_unbiased(e, make(a))]
assert {*UNBIASED} == {(e, a) for e in obj.UNBIASED for a in ("leave_one_out", "running_baseline", "gae")}
BIASED = [("k2", "running_baseline"), ("k3", "running_baseline"), ("exact", "group_normalized")]


@pytest.mark.parametrize(("estimator", "advantage"), UNBIASED)
def test_expected_gradient_is_the_gradient_of_the_objective(estimator: str, advantage: str) -> None:
    assert obj.is_unbiased(estimator, make(advantage))
    size = 2 if make(advantage).needs_group else 1
    world = Tabular(vocabulary=3 if size == 2 else 4)
    expected = expectation(world, size, lambda rows: estimate(world, rows, estimator, advantage))
    assert distance(expected, world.gradient()) < 1e-10


def test_leave_one_out_is_unbiased_for_three_samples_too() -> None:
    world = Tabular(vocabulary=3, max_length=2)  # 7 sequences, 343 triples
    expected = expectation(world, 3, lambda rows: estimate(world, rows, "exact", "leave_one_out"))
    assert distance(expected, world.gradient()) < 1e-10


@pytest.mark.parametrize(("advantage", "size"), [("leave_one_out", 2), ("running_baseline", 1)])
def test_the_entropy_bonus_is_part_of_the_objective(advantage: str, size: int) -> None:
    world = Tabular(max_length=2)
    logprob, reference = world.sequence_logprobs()
    entropy = -(logprob.exp() * logprob).sum()  # of the whole sequence: the expected sum over the states visited
    objective = exact_objective(logprob, reference, world.scores, LAMBDA) + 0.2 * entropy
    truth = exact_gradient(objective, world.parameters)
    expected = expectation(world, size, lambda rows: estimate(world, rows, "exact", advantage, entropy_coef=0.2))
    assert distance(expected, truth) < 1e-10


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
def test_group_normalized_divides_all_terms_of_a_prompt_by_the_deviation_of_its_scores(estimator: str) -> None:
    """Scores and λ in other units give the same gradient: λ is the price of a nat in units of the scores."""
    world, rows = Tabular(), torch.tensor([3, 8, 13])
    gradient = estimate(world, rows, estimator, "group_normalized")
    world.scores = world.scores * 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "LAMBDA", 10 * LAMBDA)
        scaled = estimate(world, rows, estimator, "group_normalized")
    assert distance(gradient, scaled) < 1e-3 * max(g.abs().max().item() for g in gradient)  # but for eps
    world.scores = torch.full_like(world.scores, 0.5)  # no rewrite is better than another
    assert distance(estimate(world, rows, estimator, "group_normalized"), [torch.zeros_like(g) for g in gradient]) == 0


@pytest.mark.parametrize(("estimator", "advantage"), BIASED)
def test_estimators_that_say_they_are_biased_are(estimator: str, advantage: str) -> None:
    assert not obj.is_unbiased(estimator, make(advantage))
    world = Tabular(max_length=2)
    size = 2 if make(advantage).needs_group else 1
    expected = expectation(world, size, lambda rows: estimate(world, rows, estimator, advantage))
    assert distance(expected, world.gradient()) > 1e-3


def test_gae_below_one_is_biased_by_the_values() -> None:
    assert not obj.is_unbiased("exact", make("gae", 0.9))
    world = Tabular()
    expected = expectation(world, 1, lambda rows: estimate(world, rows, "exact", "gae", gae_lambda=0.9))
    assert distance(expected, world.gradient()) > 1e-3


@pytest.mark.parametrize(("advantage", "size"), [("leave_one_out", 2), ("running_baseline", 1)])
def test_without_the_kl_of_later_states_the_gradient_is_wrong(advantage: str, size: int) -> None:
    world = Tabular()
    dropped = expectation(world, size, lambda rows: estimate(world, rows, "exact", advantage, future_kl=False))
    assert distance(dropped, world.gradient()) > 1e-2


def surrogate_gradient(world: Tabular, own_step: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Return ∇E R − λ E Σ_t ∇D_t without the derivative of state visits, which is what k2 and k3 estimate."""
    logprob, _ = world.sequence_logprobs()
    reward = (logprob.exp() * world.scores).sum()
    own = own_step(world.next_logprob(), world.reference_next_logprob())  # (states,)
    along = torch.where(world.space.mask, own[world.space.state], 0.0).sum(-1)  # (S,)
    return exact_gradient(reward - LAMBDA * (logprob.detach().exp() * along).sum(), world.parameters)


def test_k2_and_k3_estimate_what_their_documentation_says() -> None:
    world = Tabular()
    k2 = expectation(world, 1, lambda rows: estimate(world, rows, "k2", "running_baseline"))
    own_kl = surrogate_gradient(world, kl_divergence)
    assert distance(k2, own_kl) < 1e-10
    k3 = expectation(world, 1, lambda rows: estimate(world, rows, "k3", "running_baseline"))
    other_direction = surrogate_gradient(world, lambda p, q: kl_divergence(q, p))
    assert distance(k3, other_direction) < 1e-10
    assert distance(own_kl, other_direction) > 1e-3


def second_moment(world: Tabular, estimator: str, share: float = 0.0) -> float:
    """Return E |gradient|². Unbiased estimators have equal means, so this orders their variances."""

    def squares(rows: Tensor) -> list[Tensor]:
        return [g.square() for g in estimate(world, rows, estimator, "leave_one_out", share=share)]

    return sum(moment.sum().item() for moment in expectation(world, 2, squares))


@pytest.mark.slow
def test_which_estimator_varies_least_depends_on_where_the_policy_is() -> None:
    world = Tabular()
    noise = torch.randn(world.hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    world.ref_hidden, world.ref_weight = world.hidden.detach() + 0.5 * noise, world.weight.detach().clone()
    world.bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    world.scores = torch.zeros_like(world.scores)  # the KL alone: log-ratios are mere noise
    assert second_moment(world, "exact") < 0.5 * second_moment(world, "k1")
    assert second_moment(world, "k1") < second_moment(world, "k1_sequence")

    logprob, reference = world.sequence_logprobs()
    world.scores = LAMBDA * (logprob - reference).detach()  # rewards for which the policy is already ρ*
    assert distance(world.gradient(), [torch.zeros_like(p) for p in world.parameters]) < 1e-12
    assert second_moment(world, "k1") < 0.5 * second_moment(world, "exact")
    assert second_moment(world, "k1_sequence") < 1e-20
    assert second_moment(world, "regressed", share=1.0) < 1e-20

    world.scores = world.scores / 2  # over-optimised: the policy has gone twice as far as it should
    del world.statistics
    mixed = second_moment(world, "regressed", share=0.5)
    assert mixed < 0.5 * min(second_moment(world, "exact"), second_moment(world, "k1_sequence"))


def test_gibbs_gradient_on_policy_is_minus_lambda_times_the_objectives() -> None:
    world = Tabular()
    logprob, reference = world.sequence_logprobs()

    def gradient(rows: Tensor) -> list[Tensor]:
        loss = obj.gibbs_loss(logprob[rows], reference[rows], world.scores[rows], 2, LAMBDA)
        return list(torch.autograd.grad(loss, world.parameters, retain_graph=True))

    expected = expectation(world, 2, gradient)
    assert distance(expected, [-LAMBDA * g for g in world.gradient()]) < 1e-10
