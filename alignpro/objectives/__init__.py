"""From scores to per-token loss coefficients: KL, advantages, policy losses, Gibbs. Pure functions of tensors.

May import `errors` and `alignpro_kernels` only.
"""

from alignpro.objectives.advantages import (
    GAE,
    Advantage,
    GroupNormalized,
    LeaveOneOut,
    RunningBaseline,
    SampledReturns,
    is_unbiased,
    returns_to_go,
)
from alignpro.objectives.distillation import Distillation, distillation_weights
from alignpro.objectives.gibbs import Gibbs, gibbs_loss
from alignpro.objectives.importance import ImportanceWeights, effective_sample_share, importance_weights
from alignpro.objectives.kl import (
    SAMPLED,
    UNBIASED,
    AdaptiveKL,
    KLEstimator,
    KLLossTerms,
    KLPenalty,
    entropy_rewards,
    exact_kl_coef,
    final_return,
    kl_loss_terms,
    last_action,
    token_rewards,
)
from alignpro.objectives.losses import (
    Loss,
    LossInputs,
    LossOutput,
    Passes,
    PolicyGradient,
    PolicyGradientBatch,
    PPOClip,
    TokenLoss,
    cross_entropy,
    loss_count,
    value_loss,
)
from alignpro.objectives.resampling import GibbsResample, best_of_kl, best_of_weights, gibbs_resample
from alignpro.objectives.step_size import StepSize

ADVANTAGES: dict[str, type[Advantage]] = {
    "leave_one_out": LeaveOneOut,
    "group_normalized": GroupNormalized,
    "running_baseline": RunningBaseline,
    "gae": GAE,
}
"""``objective.advantage`` → class."""
LOSSES: dict[str, type[Loss]] = {
    "policy_gradient": PolicyGradient,
    "ppo_clip": PPOClip,
    "gibbs": Gibbs,
    "distillation": Distillation,
}
"""``objective.loss`` → class."""

__all__ = [
    "ADVANTAGES",
    "GAE",
    "LOSSES",
    "SAMPLED",
    "UNBIASED",
    "AdaptiveKL",
    "Advantage",
    "Distillation",
    "Gibbs",
    "GibbsResample",
    "GroupNormalized",
    "ImportanceWeights",
    "KLEstimator",
    "KLLossTerms",
    "KLPenalty",
    "LeaveOneOut",
    "Loss",
    "LossInputs",
    "LossOutput",
    "PPOClip",
    "Passes",
    "PolicyGradient",
    "PolicyGradientBatch",
    "RunningBaseline",
    "SampledReturns",
    "StepSize",
    "TokenLoss",
    "best_of_kl",
    "best_of_weights",
    "cross_entropy",
    "distillation_weights",
    "effective_sample_share",
    "entropy_rewards",
    "exact_kl_coef",
    "final_return",
    "gibbs_loss",
    "gibbs_resample",
    "importance_weights",
    "is_unbiased",
    "kl_loss_terms",
    "last_action",
    "loss_count",
    "returns_to_go",
    "token_rewards",
    "value_loss",
]
