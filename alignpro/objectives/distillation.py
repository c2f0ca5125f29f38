"""Gibbs distillation: a rollout's samples are resampled towards ρ* ∝ ρ_sft exp(R/λ), and the policy is fitted to what is kept.

ρ* is known up to a constant, so K samples of a prompt that ρ_t drew can be weighed towards it. A step aims at a share β of the
way,

    w_i = softmax_i β (R_i/λ − log ρ_t(x'_i|x)/ρ_sft(x'_i|x))        ρ_{t+1} ∝ ρ_t^{1−β} ρ*^β    as K → ∞

which is mirror ascent on the objective: the KL is to ρ_sft in every step, ρ* is the fixed point, and after n steps the policy is
the optimum for λ / (1 − (1−β)ⁿ). Some samples of each prompt are drawn by these weights, and several updates minimise their mean
−log ρ(x'|x), as supervised fine-tuning does.

A prompt whose K rewards are all equal is left out: the weights of its samples say nothing, and a fit to them would hold the
policy where it is. So the step goes further than the weights of all prompts would, most where few samples are good, and where
rewards take few values without noise its fixed point is not exactly ρ*.

The weights are those of maximum a posteriori policy optimisation (Abdolmaleki et al., 2018, arXiv 1806.06920); for β = 1 and
samples of ρ_sft, it is reward-weighted regression (Peters and Schaal, 2007) by resampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignpro.errors import ConfigError
from alignpro.objectives.losses import Loss, LossInputs, LossOutput, Passes, check_groups, cross_entropy


class Distillation(Loss):
    """The cross-entropy of the samples that are kept of a rollout.

    Args:
        step: β in (0, 1], the share of the way to ρ* that the updates on a rollout aim at.
        samples: Number of samples that are kept of each prompt, drawn with replacement.
    """

    needs_group = True
    splits_groups = True
    reads_kl = False
    needs_kl = True
    uses_advantage = False
    per_token = False

    def __init__(self, step: float = 1.0, samples: int = 2) -> None:
        self.step, self.samples = step, samples

    def keep(self, weights: Tensor, scores: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the samples of a prompt that updates are made on.

        Args:
            weights: (K,) of `distillation_weights`, on the CPU.
            scores: (K,) R.
            generator: Draws.

        Returns:
            (samples,) int64, their places among the K; (0,) if all scores are equal.
        """
        if bool(scores.max() == scores.min()):
            return torch.zeros(0, dtype=torch.int64)
        return torch.multinomial(weights, self.samples, replacement=True, generator=generator)

    def __call__(self, inputs: LossInputs, passes: Passes) -> LossOutput:
        """Compute the mean −log ρ(x'|x) of a micro-batch of samples that were kept."""
        return LossOutput(passes.token_loss(cross_entropy(inputs.scale)), {}, 0)


def distillation_weights(
    old_logprob: Tensor, reference_logprob: Tensor, scores: Tensor, group: int, kl_coef: float, step: float
) -> Tensor:
    """The weights of K samples of each prompt towards ρ_t^{1−β} ρ*^β.

    Args:
        old_logprob: (B,) log ρ_t(x'|x) of the policy that drew the samples, nats, B = P·K rows prompt-major.
        reference_logprob: (B,) log ρ_sft(x'|x).
        scores: (B,) R.
        group: K ≥ 2.
        kl_coef: λ > 0.
        step: β in (0, 1].

    Returns:
        (P, K), in the dtype of ``scores``; each row sums to 1.

    Raises:
        ConfigError: K < 2, λ ≤ 0, or β outside (0, 1].
        ValueError: Shapes do not match, or B is no multiple of K.
    """
    check_groups("distillation", (old_logprob, reference_logprob, scores), group, kl_coef)
    if not 0 < step <= 1:
        raise ConfigError(f"objective.distillation_step={step}: expected a share in (0, 1]")
    logratio = (old_logprob - reference_logprob).detach().to(scores.dtype)
    return (step * (scores.detach() / kl_coef - logratio)).view(-1, group).softmax(1)
