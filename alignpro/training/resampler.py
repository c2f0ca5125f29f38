"""Which samples of a rollout the loss `Distillation` is computed on, the same for any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from alignpro.distributed.ranks import Ranks
from alignpro.engine import derive_seed
from alignpro.objectives import Distillation, distillation_weights
from alignpro.training.experience import Experience
from alignpro.training.metrics import Metrics

logger = logging.getLogger(__name__)


class Resampler:
    """Draws the samples of a step that are kept; a draw's seed is derived from (run seed, step, prompt).

    Args:
        ranks: All ranks.
        group: K, the samples per prompt.
        seed: The run's seed.
    """

    def __init__(self, ranks: Ranks, group: int, seed: int) -> None:
        self._ranks, self._group, self._seed = ranks, group, seed

    def __call__(
        self, loss: Distillation, experience: Experience, step: int, local: Sequence[int], kl_coef: float
    ) -> tuple[Experience, list[int], int, Metrics]:
        """Keep some samples of each prompt whose rewards differ; a collective.

        Args:
            loss: Says how many, and which.
            experience: The rollout of this rank's groups.
            step: The number of the step.
            local: The indices of these groups among those of the step.
            kl_coef: λ.

        Returns:
            The samples that are kept on this rank, in groups of ``loss.samples``; the indices of these groups among those of
            all ranks; the number of the latter; and metrics: ``resampled_prompts`` is the share of prompts of which samples are
            kept, ``effective_samples`` the mean of their 1/Σ w².
        """
        K, values, mask = self._group, experience.values, experience.batch.mask
        old, reference = (
            torch.where(mask, each, 0.0).sum(1).cpu().double() for each in (values.logprob, values.reference_logprob)
        )
        scores = experience.scores.cpu().double()
        weights = distillation_weights(old, reference, scores, K, kl_coef, loss.step)
        rows, kept, effective = list[torch.Tensor](), list[int](), list[float]()
        for place, group in enumerate(local):
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "resample", step, group))
            drawn = loss.keep(weights[place], scores[place * K : (place + 1) * K], generator)
            if len(drawn):
                rows.append(place * K + drawn)
                kept.append(group)
                effective.append(1.0 / weights[place].square().sum().item())
        everywhere = sorted(group for part in self._ranks.all_gather_object(kept) for group in part)
        number = {group: i for i, group in enumerate(everywhere)}
        prompts = self._ranks.sum(len(local))
        if not everywhere and self._ranks.is_rank_zero:
            logger.warning("step %d: the rewards of each prompt are all equal, so that nothing is learned", step + 1)
        metrics = {"resampled_prompts": len(everywhere) / max(prompts, 1.0)}
        metrics["effective_samples"] = self._ranks.sum(sum(effective)) / max(len(everywhere), 1)
        chosen = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return experience.select_rows(chosen), [number[group] for group in kept], len(everywhere), metrics
