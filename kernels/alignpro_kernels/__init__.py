"""Operators for language models: the output head without its logits, and attention over a paged key-value pool.

The head's operators compute log-probability, entropy, exact KL, policy losses and samples. This package can be used
without alignpro: it imports only torch and, for its GPU kernels, triton. Layers of a decoder on a CPU are in `decoder` and
`linear`.
"""

from alignpro_kernels.attention import cascade_attention, paged_attention
from alignpro_kernels.backends import BackendError, backends
from alignpro_kernels.noise import gumbel_noise, splitmix64
from alignpro_kernels.operators import linear_logprob, linear_sample, merge_states, policy_loss
from alignpro_kernels.paged_keys import PagedKeys
from alignpro_kernels.pages import copy_pages, read_kv, write_kv
from alignpro_kernels.types import Coefficients, LoRA, PolicyLossOutput, SampleOutput, TokenStats

__all__ = [
    "BackendError",
    "Coefficients",
    "LoRA",
    "PagedKeys",
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
