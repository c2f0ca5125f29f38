"""Draw tokens. Randomness is stateless, so a sequence's tokens do not depend on what it is batched with.

The noise for a token is a function of (sequence seed, position, vocabulary entry). A sequence that is moved to another
batch, preempted or recomputed draws the same tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignpro.engine.types import SamplingParams, TokenLogprobs
from alignpro.models.head import Head
from alignpro_kernels import gumbel_noise, linear_sample
from alignpro_kernels.reference import head_logits

_MASK = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_GAMMA = np.uint64(_GOLDEN_GAMMA)


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from parts, mixing each step with SplitMix64 (Steele et al., 2014)."""
    state = 0
    for part in parts:
        value = int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
        step = 2 * _GOLDEN_GAMMA if isinstance(part, str) else _GOLDEN_GAMMA
        while True:  # 64 bits at a time, so that long parts count in full
            state = _mix((state + step) ^ (value & _MASK))
            value >>= 64
            if value in (0, -1):
                break
            step = 3 * _GOLDEN_GAMMA  # distinguishes the rest of a long part from the next part
    return state >> 1


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def seed_state(seed: int) -> int:
    """The part of ``derive_seed(seed, position)`` that is the same at all positions, an unsigned 64-bit integer."""
    return (_mix(_GOLDEN_GAMMA ^ seed) + _GOLDEN_GAMMA) & _MASK


def position_seeds(states: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Vectorised ``derive_seed(seed, position)`` from `seed_state` of the seeds; the shapes broadcast."""
    return (_mix_all(states ^ positions.view(np.uint64)) >> np.uint64(1)).view(np.int64)


def _mix_all(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Vectorised `_mix`; products of unsigned integers wrap."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(hidden: Tensor, head: Head, params: SamplingParams, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        hidden: (B, D) last hidden states.
        head: The output layer.
        params: Temperature and filters.
        seeds: (B,) int64, one per row, different at every position.

    Returns:
        Tokens (B,) int64, and their log-probabilities (B,) float32 under the distribution they were drawn from: after
        temperature, top-k, top-p and min-p, renormalised. A greedy token is certain and has log-probability 0.
    """
    filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    if not filtered or params.temperature == 0:
        token, logprob, _ = linear_sample(
            hidden, head.weight, temperature=params.temperature, seeds=seeds, **head.options
        )
        return token, logprob
    logits = head_logits(hidden, head.weight, head.bias, params.temperature, head.softcap, head.lora)  # (B, V)
    logprobs = filter_logits(logits, params).log_softmax(-1)
    token = (logprobs + gumbel_noise(seeds, logprobs.shape[-1], logprobs.dtype)).argmax(-1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1)


def model_logprobs(hidden: Tensor, head: Head, tokens: Tensor, count: int) -> list[TokenLogprobs]:
    """The log-probabilities of drawn tokens under the model itself: at temperature 1, without filters.

    Args:
        hidden: (B, D) the hidden states that they were drawn from.
        head: The output layer.
        tokens: (B,) int64, the drawn tokens.
        count: Number of likeliest tokens that are reported at each position.

    Returns:
        One per row.
    """
    logits = head_logits(hidden, head.weight, head.bias, 1.0, head.softcap, head.lora)  # (B, V)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None]).squeeze(-1)  # (B,)
    top = logprobs.topk(min(count, logprobs.shape[-1]))  # (B, count)
    rows = zip(tokens.tolist(), own.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True))) for token, logprob, ids, values in rows]


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set the logits excluded by top-k, top-p and min-p, in this order, to −inf; the most likely token always stays.

    All tokens tied with the k-th stay. Ties at the edge of top-p are resolved in favour of the lowest ids.

    Args:
        logits: (B, V), after the temperature.
        params: The filters.

    Returns:
        (B, V).
    """
    if params.top_k > 0:
        kth = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= params.top_p  # mass before this token already suffices
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    if params.min_p > 0:
        floor = logits.max(-1, keepdim=True).values + math.log(params.min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits
