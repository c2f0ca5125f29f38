"""The theory in exact form: closed form, divergences, bound, mixtures, self-reward, enumeration; and `statistics` of samples.

All are pure functions. May import `alignpro_kernels` and `errors` only.
"""

from alignpro.theory.bound import Bound, divergence_term, exact_bound, sampled_bound
from alignpro.theory.closed_form import expected_reward, log_partition, objective, optimal_policy
from alignpro.theory.divergences import kl_divergence, total_variation, tv_from_logprobs
from alignpro.theory.enumeration import (
    SequenceSpace,
    enumerate_sequences,
    exact_gradient,
    exact_objective,
    expected_gradient,
    groups,
    state_kl,
)
from alignpro.theory.mixtures import (
    Correction,
    SampledMixture,
    correction,
    dial,
    mirror_descent,
    mixture_gradient,
    mixture_policy,
    mixture_value,
    sampled_mixture,
)
from alignpro.theory.self_reward import ranks, self_reward_iterations, sentence_scores

__all__ = [
    "Bound",
    "Correction",
    "SampledMixture",
    "SequenceSpace",
    "correction",
    "dial",
    "divergence_term",
    "enumerate_sequences",
    "exact_bound",
    "exact_gradient",
    "exact_objective",
    "expected_gradient",
    "expected_reward",
    "groups",
    "kl_divergence",
    "log_partition",
    "mirror_descent",
    "mixture_gradient",
    "mixture_policy",
    "mixture_value",
    "objective",
    "optimal_policy",
    "ranks",
    "sampled_bound",
    "sampled_mixture",
    "self_reward_iterations",
    "sentence_scores",
    "state_kl",
    "total_variation",
    "tv_from_logprobs",
]
