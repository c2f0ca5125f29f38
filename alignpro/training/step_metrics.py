"""Metrics of a step's samples: means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain, EngineStats
from alignpro.environments.base import ABSTAINED, Scores
from alignpro.training.experience import Experience
from alignpro.training.loggers.jsonl import append_row
from alignpro.training.metrics import Metrics


class StepMetrics:
    """Computes the metrics of each step; every method is a collective.

    Args:
        ranks: All ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __call__(
        self,
        experience: Experience,
        scores: Scores,
        chains: Sequence[Sequence[Chain]],
        stats: EngineStats,
        kl_coef: float,
    ) -> Metrics:
        """Compute all metrics of a step.

        Args:
            experience: This rank's samples, with the log-probabilities that the trainer computed.
            scores: Their scores.
            chains: The same samples as the engine returned them.
            stats: The engine's counters of the step.
            kl_coef: λ.
        """
        merged = EngineStats.merged(self._ranks.all_gather_object(stats))
        metrics = self._samples(experience, scores) | self._logprob_difference(experience, chains) | merged.metrics()
        if experience.weights is not None:
            metrics["kl_coef_normalized"] = kl_coef * self._ranks.all_gather(experience.weights).mean().item()
        return metrics

    def score_logratio_moments(self, experience: Experience, group: int) -> tuple[float, float]:
        """Return Σ (R − mean)(L − mean) and Σ (L − mean)², L the log-ratio of a sample, with the means of each prompt.

        Args:
            experience: This rank's samples.
            group: Samples per prompt.
        """
        scores, logratio = experience.scores.view(-1, group), experience.values.logratio.sum(1).view(-1, group)
        centred = logratio - logratio.mean(1, keepdim=True)
        covariance = ((scores - scores.mean(1, keepdim=True)) * centred).sum(1)  # (P,)
        all_gather = self._ranks.all_gather
        return all_gather(covariance).sum().item(), all_gather(centred.square().sum(1)).sum().item()

    def mean_return(self, experience: Experience) -> float:
        """Return the mean of G_0, the return of whole sequences."""
        return self._ranks.all_gather(experience.returns[:, 0]).mean().item()

    def evaluation(self, values: Tensor, kl: float, count: int) -> Metrics:
        """Compute the metrics of an evaluation.

        Args:
            values: (P, 1) R of this rank's prompts.
            kl: Sum of the sequence KL of its samples, in nats.
            count: Number of prompts of all ranks.
        """
        reward = self._ranks.all_gather(values).mean().item()
        return {"eval/reward": reward, "eval/kl": self._ranks.sum(kl) / count}

    def write_sample(self, path: Path, step: int, prompts: Sequence[Prompt], scores: Scores) -> None:
        """Append the first prompt's first sample to a JSON Lines file, on rank 0."""
        if self._ranks.is_rank_zero:
            value = scores.values[0][0].item()
            append_row(path, {"step": step + 1, "prompt": prompts[0].text, **scores.texts(0, 0), "value": value})

    def _samples(self, experience: Experience, scores: Scores) -> Metrics:
        """Compute rewards, KL to the reference, entropy and length of the samples.

        Returns:
            ``kl`` and ``kl_sampled`` are in nats per sample, ``entropy`` in nats per token, ``sample/length`` in tokens.
        """
        values, all_gather = experience.values, self._ranks.all_gather
        lengths = all_gather(experience.batch.mask.sum(1))  # (B,) over all ranks, like the tensors below
        kl, entropy = all_gather(values.kl.sum(1)), all_gather(values.entropy.sum(1))
        sampled_kl = all_gather(values.logratio.sum(1))
        rewards = all_gather(scores.values)
        rows, tokens = len(lengths), lengths.sum()
        return {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std().item() if rewards.numel() > 1 else 0.0,
            "kl": (kl.sum() / rows).item(),
            "kl_sampled": (sampled_kl.sum() / rows).item(),
            "entropy": (entropy.sum() / tokens).item(),
            "sample/length": (tokens / rows).item(),
            **self._mean(scores.metrics, len(scores.values)),
        }

    def _mean(self, metrics: Mapping[str, float], count: int) -> Metrics:
        """Average metrics over the samples of all ranks; a component's over the samples from which it did not abstain."""
        share = {name: metrics.get(name + ABSTAINED, 0.0) for name in metrics}
        sums = self._ranks.mean({name: value * (1 - share[name]) for name, value in metrics.items()}, count)
        scored = {name: 1 - sums.get(name + ABSTAINED, 0.0) for name in sums}
        return {name: value / scored[name] for name, value in sums.items() if scored[name] > 0}

    def _logprob_difference(self, experience: Experience, chains: Sequence[Sequence[Chain]]) -> Metrics:
        """How much the engine's log-probabilities of the sampled tokens differ from the trainer's.

        Both are computed with the same weights, so any difference beyond rounding is a bug: the gradient would be computed
        on samples of another policy.

        Returns:
            The mean absolute difference per token, and the maximum.
        """
        sampled = torch.tensor([x for group in chains for chain in group for x in chain.sample.logprobs])
        mask, logprob = (
            experience.batch.mask.cpu(),
            experience.values.logprob.cpu(),
        )  # (B, T), in the order of the chains
        difference = torch.zeros_like(logprob)
        difference[mask] = (logprob[mask] - sampled.to(logprob)).abs()
        all_gather = self._ranks.all_gather
        totals, largest = all_gather(difference.sum(1)), all_gather(difference.amax(1))
        return {
            "sample/logprob_difference": (totals.sum() / all_gather(mask.sum(1)).sum()).item(),
            "sample/logprob_difference_max": largest.max().item(),
        }
