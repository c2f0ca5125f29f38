"""From scores to per-token loss coefficients: KL, advantages, policy losses, Gibbs. Pure functions of tensors.

May import `errors` only.
"""

from alignpro.objectives.advantages import (
    RunningBaseline,
    gae,
    group_normalized,
    is_unbiased,
    leave_one_out,
    returns_to_go,
)
from alignpro.objectives.gibbs import gibbs_loss
from alignpro.objectives.kl import AdaptiveKL, KLEstimator, KLLossTerms, kl_loss_terms, last_action, token_rewards
from alignpro.objectives.losses import (
    PolicyGradientBatch,
    TokenLoss,
    loss_count,
    policy_gradient_coefficients,
    ppo_clip_coefficients,
    value_loss,
)
from alignpro.objectives.resampling import GibbsResample, gibbs_resample

__all__ = [
    "AdaptiveKL",
    "GibbsResample",
    "KLEstimator",
    "KLLossTerms",
    "PolicyGradientBatch",
    "RunningBaseline",
    "TokenLoss",
    "gae",
    "gibbs_loss",
    "gibbs_resample",
    "group_normalized",
    "is_unbiased",
    "kl_loss_terms",
    "last_action",
    "leave_one_out",
    "loss_count",
    "policy_gradient_coefficients",
    "ppo_clip_coefficients",
    "returns_to_go",
    "token_rewards",
    "value_loss",
]
