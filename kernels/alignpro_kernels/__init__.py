"""Operators of a language model's head: log-probability, entropy, exact KL, policy loss, sampling."""

from alignpro_kernels.backends import BackendError, backends
from alignpro_kernels.noise import gumbel_noise, splitmix64
from alignpro_kernels.operators import linear_logprob, linear_sample, merge_states, policy_loss
from alignpro_kernels.types import Coefficients, PolicyLossOutput, SampleOutput, TokenStats

__all__ = [
    "BackendError",
    "Coefficients",
    "PolicyLossOutput",
    "SampleOutput",
    "TokenStats",
    "backends",
    "gumbel_noise",
    "linear_logprob",
    "linear_sample",
    "merge_states",
    "policy_loss",
    "splitmix64",
]
