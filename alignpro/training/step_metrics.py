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
from alignpro.objectives import effective_sample_share
from alignpro.targets.base import Responder
from alignpro.targets.server_metrics import CONCURRENCY, SHOWN, added
from alignpro.targets.servers import NO_SERVERS, Servers
from alignpro.training.experience import Experience, sampled_logprob
from alignpro.training.loggers.jsonl import append_row
from alignpro.training.metrics import Metrics


class StepMetrics:
    """Computes the metrics of each step; every method is a collective.

    Args:
        ranks: All ranks.
        responder: What responds to the samples; it counts what is asked of its servers.
        servers: Those of the job; they count what rewards ask.
    """

    def __init__(self, ranks: Ranks, responder: Responder | None = None, servers: Servers = NO_SERVERS) -> None:
        self._ranks = ranks
        self._responder = responder if responder is not None and responder.remote else None
        self._servers = servers
        asked_by_check = servers.reward_metrics()  # is of no step
        self._has_servers = self._responder is not None or bool(asked_by_check)

    @property
    def of_servers(self) -> tuple[str, ...]:
        """The metrics of servers that progress shows; none without servers."""
        return SHOWN if self._has_servers else ()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the servers."""
        return {} if self._responder is None else {"responder": self._responder.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._responder is not None:
            self._responder.load_state_dict(state.get("responder", {}))

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
        importance = experience.importance
        if importance is not None:
            rows |= {"importance": importance.weights, "excess": importance.excess}
        elif experience.weights is not None:
            rows["weights"] = experience.weights
        rows = self._ranks.all_gather(rows)
        merged = EngineStats.merged(self._ranks.all_gather_object(stats))
        metrics = _sample_means(rows) | self._mean(scores.metrics, len(scores.values)) | merged.metrics()
        if importance is not None:
            metrics |= _importance_metrics(rows["importance"], rows["excess"])
        elif experience.weights is not None:
            metrics["kl_coef_normalized"] = kl_coef * rows["weights"].mean().item()
        return metrics | self._asked()

    def _asked(self) -> Metrics:
        """What was asked of servers since the last call; none without servers.

        It is added up over ranks; times and shares are means, and concurrency is that of rank 0.
        """
        if not self._has_servers:
            return {}
        of_target = {} if self._responder is None else self._responder.metrics()
        metrics = added(of_target, self._servers.reward_metrics())
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

    def of_evaluation(self) -> Metrics:
        """What an evaluation asked of servers, which is in no step's metrics; none without servers."""
        own = ("endpoint/", "seconds/")
        return {
            f"eval/{name}": value
            for name, value in self._asked().items()
            if name.startswith(own) and not name.startswith(CONCURRENCY)
        }

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

    Unless samples are drawn ahead, both are computed with the same weights, and any difference beyond rounding is a bug: the
    gradient would be computed on samples of another policy.
    """
    mask, logprob = experience.batch.mask.cpu(), experience.values.logprob.cpu()
    difference = torch.where(mask, (logprob - sampled_logprob(chains, mask).to(logprob)).abs(), 0.0)  # (B, T)
    return {"difference": difference.sum(1), "largest_difference": difference.amax(1)}


def _importance_metrics(weights: Tensor, excess: Tensor) -> Metrics:
    """Describe the importance weights of all ranks' rows, (B,), and what a limit took from them, (B,).

    Returns:
        ``importance/effective`` is the effective share of the samples; ``importance/truncated`` is the mean excess, which
        bounds the bias.
    """
    return {
        "importance/mean": weights.mean().item(),
        "importance/max": weights.max().item(),
        "importance/effective": effective_sample_share(weights),
        "importance/truncated": excess.mean().item(),
    }


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
