"""The Gibbs objective: regression on the closed form ρ* ∝ ρ_sft exp(R/λ).

At ρ*, log ρ − log ρ_sft − R/λ is the same constant −log Z for every rewrite of a prompt. So the loss is the variance
within a group of

    Δ_i = λ (log ρ(x'_i|x) − log ρ_sft(x'_i|x)) − R(x, x'_i)        L = ½ · 1/(K−1) · Σ_i (Δ_i − mean Δ)²

Its minimum is ρ* for any sampling distribution with full support, so old rewrites may be reused. On policy its gradient
is −λ times the leave-one-out ascent direction with the sampled KL of the whole sequence in the reward, so that
E ∇L = −λ ∇J.
"""

from __future__ import annotations

from torch import Tensor

from alignpro.objectives.losses import Loss, LossInputs, LossOutput, Passes, check_groups


class Gibbs(Loss):
    """The Gibbs loss, whose minimum is ρ* for any samples."""

    needs_group = True
    needs_kl = True
    uses_advantage = False
    per_token = False
    any_sampler = True

    def __call__(self, inputs: LossInputs, passes: Passes) -> LossOutput:
        """Compute the loss of a micro-batch of whole groups."""
        reference = inputs.reference_logprob.sum(1)
        loss = gibbs_loss(passes.sequence_logprob(), reference, inputs.scores, inputs.group, inputs.kl_coef)
        return LossOutput(loss * inputs.share, {}, 0)


def gibbs_loss(
    sequence_logprob: Tensor, reference_logprob: Tensor, scores: Tensor, group: int, kl_coef: float
) -> Tensor:
    """The Gibbs loss, averaged over prompts; differentiable in ``sequence_logprob`` only.

    Args:
        sequence_logprob: (B,) Σ_t log ρ(a_t|s_t), nats, B = P·K rows prompt-major.
        reference_logprob: (B,) the same under ρ_sft.
        scores: (B,) R.
        group: K ≥ 2.
        kl_coef: λ > 0.

    Returns:
        () in the dtype of ``sequence_logprob``.

    Raises:
        ConfigError: K < 2 or λ ≤ 0.
        ValueError: Shapes do not match, or B is no multiple of K.
    """
    check_groups("gibbs", (sequence_logprob, reference_logprob, scores), group, kl_coef)
    dtype = sequence_logprob.dtype
    delta = kl_coef * (sequence_logprob - reference_logprob.detach().to(dtype)) - scores.detach().to(dtype)
    delta = delta.view(-1, group)  # (P, K)
    centred = delta - delta.mean(1, keepdim=True)
    return 0.5 * centred.square().sum(1).div(group - 1).mean()
