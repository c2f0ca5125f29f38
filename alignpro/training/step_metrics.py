"""Metrics of a step's samples: means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain
from alignpro.environments.base import Scores
from alignpro.training.experience import Experience
from alignpro.training.metrics import Metrics


def sample_metrics(ranks: Ranks, experience: Experience, scores: Scores) -> Metrics:
    """Compute rewards, KL to the reference, entropy and length of the samples; a collective.

    Args:
        ranks: All ranks.
        experience: This rank's samples.
        scores: Their scores.

    Returns:
        ``kl`` and ``kl_sampled`` are in nats per sample, ``entropy`` in nats per token, ``sample/length`` in tokens.
    """
    values, gather = experience.values, ranks.all_gather
    lengths = gather(experience.batch.mask.sum(1))  # (B,) over all ranks, like the tensors below
    kl, entropy = gather(values.kl.sum(1)), gather(values.entropy.sum(1))
    sampled_kl = gather((values.logprob - values.reference_logprob).sum(1))
    rewards = gather(scores.values)
    rows, tokens = len(lengths), lengths.sum()
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item() if rewards.numel() > 1 else 0.0,
        "kl": (kl.sum() / rows).item(),
        "kl_sampled": (sampled_kl.sum() / rows).item(),
        "entropy": (entropy.sum() / tokens).item(),
        "sample/length": (tokens / rows).item(),
        **ranks.mean(scores.metrics, len(scores.values)),
    }


def logprob_difference(ranks: Ranks, experience: Experience, chains: Sequence[Sequence[Chain]]) -> Metrics:
    """How much the engine's log-probabilities of the sampled tokens differ from the trainer's; a collective.

    Both are computed with the same weights, so any difference beyond rounding is a bug: the gradient would be computed on
    samples of another policy.

    Args:
        ranks: All ranks.
        experience: This rank's samples, with the log-probabilities that the trainer computed.
        chains: The same samples as the engine returned them.

    Returns:
        The mean absolute difference per token, and the maximum.
    """
    drawn = torch.tensor([x for group in chains for chain in group for x in chain.sample.logprobs])
    mask, logprob = experience.batch.mask.cpu(), experience.values.logprob.cpu()  # (B, T), in the order of the chains
    difference = torch.zeros_like(logprob)
    difference[mask] = (logprob[mask] - drawn.to(logprob)).abs()
    totals, largest = ranks.all_gather(difference.sum(1)), ranks.all_gather(difference.amax(1))
    return {
        "sample/logprob_difference": (totals.sum() / ranks.all_gather(mask.sum(1)).sum()).item(),
        "sample/logprob_difference_max": largest.max().item(),
    }
