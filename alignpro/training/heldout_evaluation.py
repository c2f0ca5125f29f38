"""The evaluation of the policy during training, on prompts that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain, Engine, SamplingParams, derive_seed
from alignpro.environments.base import Environment
from alignpro.training.assignment import PromptAssignment
from alignpro.training.experience import sample_batch
from alignpro.training.gradient_accumulation import GradientAccumulation
from alignpro.training.metrics import Evaluation
from alignpro.training.step_phases import StepPhases

OBJECTIVE = "eval/objective"
"""The metric J = R − λ KL of the evaluated prompts, by which checkpoints are compared."""
OBJECTIVE_ERROR = "eval/objective_error"
"""Its standard error over prompts."""


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Computes reward and KL of one sample for each of some prompts: the same samples each time, but for the policy."""

    environment: Environment
    engine: Engine
    accumulate: GradientAccumulation
    """Divides sequences into passes of its policy."""
    sampling: SamplingParams
    seed: int
    """The run's."""
    kl_coef: float
    """λ as configured: with that of an adaptive penalty, J would not be comparable between steps."""
    phase: StepPhases
    assign: PromptAssignment
    ranks: Ranks

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt]) -> Evaluation:
        """Evaluate; a collective.

        Args:
            prompts: At least one, the same on all ranks.

        Returns:
            ``eval/reward``, ``eval/kl`` in nats per sequence, and their J with its standard error, which needs two prompts;
            and J of each prompt, in their order.
        """
        self.phase.begin("evaluation")
        local, local_prompts = self.assign(prompts, self.sampling.n)
        seeds = [derive_seed(self.seed, "evaluate", i) for i in local]
        chains, values, batch = list[list[Chain]](), torch.empty(0, 1), None
        policy = self.accumulate.policy
        with self.phase("rollout"):
            if local:
                chains = self.environment.rollout(self.engine, local_prompts, replace(self.sampling, n=1), seeds)
        with self.phase("reward"):
            if local:
                values = self.environment.score(local_prompts, chains).values
                batch = sample_batch(self.environment.encode, local_prompts, chains, policy.model.device)
        with self.phase("credit"):
            kl = [policy.token_stats(part).kl.sum(1) for part in self.accumulate.passes(batch)]
        return self._gather(local, values, torch.cat(kl)[: len(local)])

    def _gather(self, local: Sequence[int], values: Tensor, kl: Tensor) -> Evaluation:
        """Gather and average over the prompts of all ranks.

        Args:
            local: (P,) indices of this rank's prompts.
            values: (P, 1) R of this rank's prompts.
            kl: (P,) KL of their samples, in nats.
        """
        own = torch.tensor(local, dtype=torch.int64)
        rows = self.ranks.all_gather({"prompt": own, "reward": values[:, 0].cpu(), "kl": kl.cpu()})
        count = len(rows["prompt"])
        metrics = {"eval/reward": rows["reward"].mean().item(), "eval/kl": rows["kl"].sum().item() / count}
        # Which rank has which prompt follows the lengths of samples, and so changes between evaluations.
        each = (rows["reward"].double() - self.kl_coef * rows["kl"].double())[rows["prompt"].argsort()]
        metrics[OBJECTIVE] = each.mean().item()
        if count > 1:
            metrics[OBJECTIVE_ERROR] = each.std().item() / math.sqrt(count)
        return Evaluation(metrics, each.tolist())
