"""Log-probabilities of the sampled actions under policy and reference, their exact KL, and the policy's entropy.

They are computed from hidden states by the fused head operators, which never hold all logits. Every distribution is the
one at the sampling temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alignpro.models.head import Head
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro_kernels import linear_logprob


@dataclass(frozen=True)
class TokenStats:
    """Per-action statistics of sampled sequences; (B, T), zero outside the mask."""

    logprob: Tensor
    """log ρ(a_t|s_t)."""
    reference_logprob: Tensor
    """log ρ_sft(a_t|s_t)."""
    kl: Tensor
    """KL(ρ(·|s_t) ‖ ρ_sft(·|s_t)) over the whole vocabulary, in nats."""
    entropy: Tensor
    """Entropy of ρ(·|s_t), in nats."""
    reference_states: Tensor
    """(N, D): the reference's hidden states, row by row. They do not change while the policy is updated."""
    policy_states: Tensor
    """(N, D): the policy's hidden states, without a graph; from them the KL to the policy after an update is computed."""
    states: Tensor | None = None
    """(N, D): the policy's hidden states with their autograd graph, if requested; valid until its weights change."""

    @property
    def logratio(self) -> Tensor:
        """log ρ(a_t|s_t) − log ρ_sft(a_t|s_t), (B, T)."""
        return self.logprob - self.reference_logprob


def policy_and_reference_stats(
    head: Head,
    states: Tensor,
    reference_head: Head,
    reference_states: Tensor,
    targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logprob, reference logprob, KL and entropy of N actions, (N,) float32 each; see `TokenStats`.

    Args:
        head: The policy's output layer.
        states: (N, D) of the policy, at which the actions were chosen.
        reference_head: The reference's output layer.
        reference_states: (N, D') of the reference.
        targets: (N,) int64: the actions.
        temperature: The sampling temperature.
    """
    stats = linear_logprob(
        states,
        head.weight,
        targets,
        temperature=temperature,
        **head.options,
        entropy=True,
        **reference_arguments(head, reference_head, reference_states),
    )
    reference_stats = linear_logprob(
        reference_states, reference_head.weight, targets, temperature=temperature, **reference_head.options
    )
    assert stats.kl is not None and stats.entropy is not None  # requested above
    return stats.logprob, reference_stats.logprob, stats.kl, stats.entropy


def kl_between_heads(
    head: Head, states: Tensor, other_head: Head, other_states: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    """Compute KL(p ‖ q) over the whole vocabulary at N states, in nats, (N,) float32.

    Args:
        head: The output layer of p.
        states: (N, D) of p.
        other_head: The output layer of q.
        other_states: (N, D) of q.
        targets: (N,) int64: the actions.
        temperature: The sampling temperature.
    """
    stats = linear_logprob(
        states,
        head.weight,
        targets,
        temperature=temperature,
        **head.options,
        **reference_arguments(head, other_head, other_states),
    )
    assert stats.kl is not None  # requested above
    return stats.kl


def reference_arguments(head: Head, reference_head: Head, reference_states: Tensor) -> dict[str, Any]:
    """Return the reference's keyword arguments for the head operators; a shared head is passed once and read once.

    A trained head is never shared: the reference keeps its own.
    """
    if head.shares_storage_with(reference_head) and reference_head.lora is None and not head.weight.requires_grad:
        return {"ref_hidden": reference_states}
    return {"ref_hidden": reference_states, "ref_weight": reference_head.merged, "ref_bias": reference_head.bias}


def sequence_logprob(model: LanguageModel, batch: SequenceBatch, temperature: float) -> Tensor:
    """Compute the log-probability of each whole completion at a temperature, (B,), differentiable."""
    return completion_logprob(model.head, model.action_states(batch), batch, temperature)


def completion_logprob(head: Head, states: Tensor, batch: SequenceBatch, temperature: float) -> Tensor:
    """Compute the same from the states at which the actions were chosen: (N, D) → (B,)."""
    stats = linear_logprob(states, head.weight, batch.targets, temperature=temperature, **head.options)
    return batch.scatter(stats.logprob).sum(1)
