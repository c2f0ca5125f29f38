"""Operators for a language model's head (log-probability, entropy, exact KL, policy loss, sampling) and a paged KV pool."""

from alignpro_kernels.attention import CascadeLevel, cascade_attention, paged_attention
from alignpro_kernels.backends import BackendError, backends
from alignpro_kernels.noise import gumbel_noise, splitmix64
from alignpro_kernels.operators import linear_logprob, linear_sample, merge_states, policy_loss
from alignpro_kernels.pages import copy_pages, read_kv, write_kv
from alignpro_kernels.types import Coefficients, LoRA, PolicyLossOutput, SampleOutput, TokenStats

__all__ = [
    "BackendError",
    "CascadeLevel",
    "Coefficients",
    "LoRA",
    "PolicyLossOutput",
    "SampleOutput",
    "TokenStats",
    "backends",
    "cascade_attention",
    "copy_pages",
    "gumbel_noise",
    "linear_logprob",
    "linear_sample",
    "merge_states",
    "paged_attention",
    "policy_loss",
    "read_kv",
    "splitmix64",
    "write_kv",
]
