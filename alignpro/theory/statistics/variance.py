"""Variance of nested rewards, in parts."""

from __future__ import annotations

from dataclasses import dataclass

from alignpro.theory.statistics.values import Values, finite


@dataclass(frozen=True)
class VarianceParts:
    """Var(r) decomposed by the law of total variance; ``total`` is the sum of the other three.

    The parts are unbiased estimates and are not clipped, so a part whose true value is near zero may be negative.
    """

    total: float
    prompts: float
    """Between prompts: Var_x E[r | x]."""
    rewrites: float
    """Between the rewrites of a prompt: E_x Var_x' E[r | x, x']."""
    responses: float
    """Between the responses to a rewrite: E_{x,x'} Var_y [r | x, x', y]."""


def nested_variance(rewards: Values) -> VarianceParts:
    """Unbiased variance parts of balanced nested samples, from the mean squares of a nested ANOVA.

    With mean squares MS_y within rewrites, MS_x' between the rewrites of a prompt and MS_x between prompts,

        E MS_y  = σ²_y      E MS_x' = σ²_y + M σ²_x'      E MS_x = σ²_y + M σ²_x' + K M σ²_x

    which is solved for the three σ² (Searle, Casella & McCulloch, Variance Components, 1992, section 3.6).

    An axis of length 1 gives no information about its own level: that part is 0, and its variance is counted in the level
    above. So K = 1 is right for an arm without rewrites, M = 1 counts the responses' variance in ``rewrites``, and the
    total stays unbiased. With P = 1 the variance between prompts is unknown, and the total is that within the one prompt.

    Args:
        rewards: (P, K, M), finite.

    Raises:
        ValueError: The shape is not (P, K, M) with P, K, M ≥ 1, or a reward is not finite.
    """
    r = finite(rewards)
    if r.ndim != 3:
        raise ValueError(f"nested_variance takes rewards of shape (P, K, M), got {r.shape}")
    P, K, M = r.shape
    of_rewrite = r.mean(axis=2)  # (P, K)
    of_prompt = of_rewrite.mean(axis=1)  # (P,)

    ms_response = ((r - of_rewrite[:, :, None]) ** 2).sum() / (P * K * (M - 1)) if M > 1 else 0.0
    ms_rewrite = M * ((of_rewrite - of_prompt[:, None]) ** 2).sum() / (P * (K - 1)) if K > 1 else ms_response
    ms_prompt = K * M * ((of_prompt - of_prompt.mean()) ** 2).sum() / (P - 1) if P > 1 else ms_rewrite

    responses = float(ms_response)
    rewrites = float(ms_rewrite - ms_response) / M
    prompts = float(ms_prompt - ms_rewrite) / (K * M)
    return VarianceParts(total=prompts + rewrites + responses, prompts=prompts, rewrites=rewrites, responses=responses)
