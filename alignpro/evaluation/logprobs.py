"""Log-probabilities of an arm's samples: whole completions, and the exact KL between two prompters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignpro.engine import Completion
from alignpro.evaluation.arms import ArmSamples
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.reference_logprobs import kl_between_heads, sequence_logprob


@torch.no_grad()
def sequence_kl(
    model: LanguageModel, reference: LanguageModel, inputs: Sequence[Sequence[int]], arm: ArmSamples, temperature: float
) -> Tensor:
    """Exact KL(model ‖ reference) on an arm's samples, in nats per sequence; both models share one vocabulary.

    Returns:
        (P,) float64 on the CPU: the mean over the samples of each prompt.
    """
    prompts = [ids for ids, group in zip(inputs, arm.chains, strict=True) for _ in group]
    samples = [chain.sample.tokens for group in arm.chains for chain in group]
    sums = []
    for batch in _batches(prompts, samples, model):
        states, others = model.action_states(batch), reference.action_states(batch)
        kl = kl_between_heads(model.head, states, reference.head, others, batch.targets, temperature)
        sums.append(batch.scatter(kl).sum(1).double().cpu())
    return torch.cat(sums).view(len(arm.chains), -1).mean(1)


@torch.no_grad()
def logprobs(
    model: LanguageModel, prompts: Sequence[Sequence[int]], completions: Sequence[Completion], temperature: float
) -> Tensor:
    """log p(y|prompt) of whole completions, (N,) float64 on the CPU."""
    tokens = [completion.tokens for completion in completions]
    parts = [sequence_logprob(model, batch, temperature) for batch in _batches(prompts, tokens, model)]
    return torch.cat(parts).double().cpu()


def _batches(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], model: LanguageModel, size: int = 128
) -> list[SequenceBatch]:
    """Split sequences into batches of ``size``, in order."""
    return [
        SequenceBatch.build(prompts[start : start + size], completions[start : start + size], model.device)
        for start in range(0, len(prompts), size)
    ]
