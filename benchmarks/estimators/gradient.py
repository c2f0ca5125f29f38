"""The gradient of a group of samples, from the objectives that training uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from alignpro import objectives
from benchmarks.estimators.world import World


@dataclass(frozen=True)
class Case:
    """An estimator of the gradient."""

    name: str
    estimator: objectives.KLEstimator
    advantage: str = "leave_one_out"
    normalize_by: Literal["sequence", "token"] = "sequence"

    def penalty(self, kl_coef: float) -> objectives.KLPenalty:
        """A new KL penalty."""
        return objectives.KLPenalty(self.estimator, objectives.AdaptiveKL(kl_coef))


CASES = (
    Case("exact", "exact"),
    Case("k1", "k1"),
    Case("k1_sequence", "k1_sequence"),
    Case("regressed", "regressed"),
    Case("k2", "k2"),
    Case("k3", "k3"),
    Case("exact, token", "exact", normalize_by="token"),
    Case("group_normalized × regressed", "regressed", "group_normalized"),
    Case("group_normalized × exact", "exact", "group_normalized"),
    Case("group_normalized × k3", "k3", "group_normalized"),
    Case("running_baseline × k1_sequence", "k1_sequence", "running_baseline"),
)


@dataclass(frozen=True)
class Samples:
    """G groups of K sequences."""

    prompt: Tensor
    """(G,) int64: the prompt of each group."""
    sequence: Tensor
    """(G, K) int64: which of the S sequences."""


def moments(world: World, policy: Tensor, samples: Samples) -> tuple[float, float]:
    """Σ (R − mean)(L − mean) and Σ (L − mean)², as `StepMetrics` computes them."""
    scores = world.rewards[samples.prompt[:, None], samples.sequence]
    logratio = (world.sequence_logprob(policy) - world.reference_logprob)[samples.prompt[:, None], samples.sequence]
    centred = logratio - logratio.mean(1, keepdim=True)
    return ((scores - scores.mean(1, keepdim=True)) * centred).sum().item(), centred.square().sum().item()


def ascent(
    world: World,
    policy: Tensor,
    samples: Samples,
    case: Case,
    penalty: objectives.KLPenalty,
    advantage: objectives.Advantage,
    drawn_from: Tensor | None = None,
) -> Tensor:
    """The estimate of each group, (G, n, V), with respect to the logits of every state.

    Args:
        world: Rewards and reference.
        policy: (P, n, V) log-probabilities of the next token.
        samples: The groups.
        case: What is estimated.
        penalty: Its KL penalty.
        advantage: Its advantage.
        drawn_from: (P, n, V): the policy that drew the samples; if given, this is a later update of ``ppo_clip``.
    """
    groups, size = samples.sequence.shape
    space, flat = world.space, samples.sequence.flatten()
    mask, tokens, state = space.mask[flat], space.tokens[flat], space.state[flat]  # (B, T)
    prompt = samples.prompt.repeat_interleave(size)[:, None].expand_as(state)
    scores = world.rewards[prompt[:, 0], flat]
    behaviour = policy if drawn_from is None else drawn_from
    state_kl = (behaviour.exp() * (behaviour - world.reference)).sum(-1)  # (P, n)
    old_logprob, ref_logprob = (table[prompt, state, tokens] for table in (behaviour, world.reference))
    rewards, final = penalty.penalize(scores, mask, state_kl[prompt, state], old_logprob - ref_logprob)
    returns = objectives.returns_to_go(rewards, mask)
    sampled = objectives.SampledReturns(rewards, returns, mask, scores, size, final=final)
    batch = objectives.LossInputs(
        mask=mask,
        advantages=advantage(sampled),
        reference_logprob=ref_logprob,
        old_logprob=old_logprob,
        scores=scores,
        group=size,
        scale=1 / size,
        share=1.0,
        kl_coef=world.kl_coef,
        kl_estimator=penalty.estimator,
        entropy_coef=0.0,
        sampled_share=penalty.sampled_share,
        weights=advantage.weights(sampled),
    ).actions()
    if case.normalize_by == "token":  # a mean over the tokens of each group
        tokens_of_group = mask.view(groups, -1).sum(1).repeat_interleave(size)
        batch = replace(batch, scale=(1 / tokens_of_group.to(scores))[:, None].expand_as(mask)[mask])
    loss = objectives.PolicyGradient() if drawn_from is None else objectives.PPOClip()
    prompt, state, token = prompt[mask], state[mask], tokens[mask]  # (N,)
    logp, logq = policy[prompt, state], world.reference[prompt, state]  # (N, V)
    p, kl = logp.exp(), (logp.exp() * (logp - logq)).sum(-1)
    chosen = logp.gather(1, token[:, None]).squeeze(1)
    _, alpha, _, kappa = loss.coefficients(batch)(chosen, None, kl, torch.arange(len(token)))
    assert alpha is not None  # the surrogate depends on the log-probability
    gradient = alpha[:, None] * (torch.nn.functional.one_hot(token, p.shape[1]) - p)
    if kappa is not None:
        gradient = gradient + kappa[:, None] * p * (logp - logq - kl[:, None])
    total = torch.zeros(groups, *policy.shape[1:], dtype=policy.dtype)
    group = torch.arange(groups).repeat_interleave(size)[:, None].expand_as(mask)[mask]
    return total.index_put_((group, state), -gradient, accumulate=True)
