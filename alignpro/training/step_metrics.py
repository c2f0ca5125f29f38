"""Metrics of a step's samples: means over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain, EngineStats
from alignpro.environments.base import ABSTAINED, Scores
from alignpro.targets.base import Responder
from alignpro.targets.server_metrics import CONCURRENCY, SHOWN
from alignpro.training.experience import Experience
from alignpro.training.loggers.jsonl import append_row
from alignpro.training.metrics import Metrics


class StepMetrics:
    """Computes the metrics of each step; every method is a collective.

    Args:
        ranks: All ranks.
        responder: What responds to the samples; it counts what is asked of servers.
    """

    def __init__(self, ranks: Ranks, responder: Responder | None = None) -> None:
        self._ranks = ranks
        self._servers = responder if responder is not None and responder.remote else None

    @property
    def of_servers(self) -> tuple[str, ...]:
        """The metrics of servers that progress shows; none without servers."""
        return () if self._servers is None else SHOWN

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the servers."""
        return {} if self._servers is None else {"responder": self._servers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._servers is not None:
            self._servers.load_state_dict(state.get("responder", {}))

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
        rows = _sample_rows(experience, scores) | _logprob_difference(experience, chains)
        if experience.weights is not None:
            rows["weights"] = experience.weights
        rows = self._ranks.all_gather(rows)
        merged = EngineStats.merged(self._ranks.all_gather_object(stats))
        metrics = _sample_means(rows) | self._mean(scores.metrics, len(scores.values)) | merged.metrics()
        if experience.weights is not None:
            metrics["kl_coef_normalized"] = kl_coef * rows["weights"].mean().item()
        return metrics if self._servers is None else metrics | self._asked(self._servers.metrics())

    def _asked(self, metrics: Mapping[str, float]) -> Metrics:
        """Add up over ranks what was asked of servers; times and shares are means, and concurrency is that of rank 0."""
        means = self._ranks.mean(metrics, 1)
        summed = {
            name: each * self._ranks.size if name.startswith("endpoint/") else each for name, each in means.items()
        }
        allowed = {name: float(self._ranks.reduce_max(int(metrics[name]))) for name in metrics if CONCURRENCY in name}
        return summed | allowed

    def score_logratio_moments(self, experience: Experience, group: int) -> tuple[float, float]:
        """Return Σ (R − mean)(L − mean) and Σ (L − mean)², L the log-ratio of a sample, with the means of each prompt.

        Args:
            experience: This rank's samples.
            group: Samples per prompt.
        """
        scores, logratio = experience.scores.view(-1, group), experience.values.logratio.sum(1).view(-1, group)
        centred = logratio - logratio.mean(1, keepdim=True)
        covariance = ((scores - scores.mean(1, keepdim=True)) * centred).sum(1)  # (P,)
        moments = self._ranks.all_gather({"covariance": covariance, "variance": centred.square().sum(1)})
        return moments["covariance"].sum().item(), moments["variance"].sum().item()

    def mean_return(self, experience: Experience) -> float:
        """Return the mean of G_0, the return of whole sequences."""
        return self._ranks.all_gather({"returns": experience.returns[:, 0]})["returns"].mean().item()

    def write_sample(self, path: Path, step: int, prompts: Sequence[Prompt], scores: Scores) -> None:
        """Append the first prompt's first sample to a JSON Lines file, on rank 0."""
        if self._ranks.is_rank_zero:
            value = scores.values[0][0].item()
            append_row(path, {"step": step + 1, "prompt": prompts[0].text, **scores.texts(0, 0), "value": value})

    def _mean(self, metrics: Mapping[str, float], count: int) -> Metrics:
        """Average metrics over the samples of all ranks; a component's over the samples from which it did not abstain."""
        share = {name: metrics.get(name + ABSTAINED, 0.0) for name in metrics}
        sums = self._ranks.mean({name: value * (1 - share[name]) for name, value in metrics.items()}, count)
        scored = {name: 1 - sums.get(name + ABSTAINED, 0.0) for name in sums}
        return {name: value / scored[name] for name, value in sums.items() if scored[name] > 0}


def _sample_rows(experience: Experience, scores: Scores) -> dict[str, Tensor]:
    """Rewards, KL to the reference and entropy in nats, and length in tokens, of each sample: (B,); rewards (P, K)."""
    values = experience.values
    return {
        "length": experience.batch.mask.sum(1),
        "kl": values.kl.sum(1),
        "entropy": values.entropy.sum(1),
        "sampled_kl": values.logratio.sum(1),
        "reward": scores.values,
    }


def _logprob_difference(experience: Experience, chains: Sequence[Sequence[Chain]]) -> dict[str, Tensor]:
    """How much the engine's log-probabilities of each sample's tokens differ from the trainer's: sum and maximum, (B,).

    Both are computed with the same weights, so any difference beyond rounding is a bug: the gradient would be computed
    on samples of another policy.
    """
    sampled = torch.tensor([x for group in chains for chain in group for x in chain.sample.logprobs])
    # (B, T), in the order of the chains
    mask, logprob = experience.batch.mask.cpu(), experience.values.logprob.cpu()
    difference = torch.zeros_like(logprob)
    difference[mask] = (logprob[mask] - sampled.to(logprob)).abs()
    return {"difference": difference.sum(1), "largest_difference": difference.amax(1)}


def _sample_means(rows: Mapping[str, Tensor]) -> Metrics:
    """Average the rows of all ranks.

    Returns:
        ``kl`` and ``kl_sampled`` are in nats per sample, ``entropy`` in nats per token, ``sample/length`` in tokens;
        ``sample/logprob_difference`` is a mean per token.
    """
    count, tokens, rewards = len(rows["length"]), rows["length"].sum(), rows["reward"]
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std().item() if rewards.numel() > 1 else 0.0,
        "kl": (rows["kl"].sum() / count).item(),
        "kl_sampled": (rows["sampled_kl"].sum() / count).item(),
        "entropy": (rows["entropy"].sum() / tokens).item(),
        "sample/length": (tokens / count).item(),
        "sample/logprob_difference": (rows["difference"].sum() / tokens.cpu()).item(),
        "sample/logprob_difference_max": rows["largest_difference"].max().item(),
    }
