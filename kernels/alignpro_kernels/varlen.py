"""Attention over sequences of different lengths, one after the other in memory: what a library of kernels computes.

Each library is a class with the same two functions, which call it with its own names and layouts (`flash_attn_packages`,
`torch_flash`). All of them return the log-sum-exp of the scores and have a backward pass from (out, lse), so that
attention to several sets of keys can be merged and differentiated (`alignpro_kernels.merged_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""Head dimensions are multiples of 8 up to this."""


@dataclass(frozen=True)
class Varlen:
    """S sequences of queries, each with a sequence of keys. The tensors are on the device of the queries."""

    cu_queries: Tensor
    """(S + 1,) int32, contiguous: sequence s has the queries cu_queries[s] to cu_queries[s + 1]."""
    cu_keys: Tensor
    """(S + 1,) int32, contiguous: likewise for the keys; its first S entries say where each sequence's keys begin."""
    max_queries: int
    """An upper bound of the number of queries of a sequence."""
    max_keys: int
    """An upper bound of the number of keys of a sequence."""
    causal: bool
    """Whether a query sees the keys up to its own; the last query of a sequence sees all of its keys."""
    key_lengths: Tensor | None = None
    """(S,) int32, contiguous: the number of keys of each sequence if that is not the distance of the entries of
    ``cu_keys``. Such a call has no backward pass."""

    @property
    def query_bound(self) -> int:
        """The bound of the number of queries as FlashAttention-2 takes it, which reads 1 as "every sequence has exactly one"."""
        return max(2, self.max_queries)


@dataclass(frozen=True)
class ScoreOptions:
    """How the score of a query and a key is computed, and which keys a causal query sees."""

    scale: float
    """Scores are scale · q · k."""
    softcap: float | None = None
    """Scores become softcap · tanh(score / softcap)."""
    window: int | None = None
    """With a causal mask, a query sees the last ``window`` keys up to its own."""

    def sides(self, unlimited: int | None) -> tuple[int | None, int | None]:
        """The window as the number of keys to the left and to the right of a query's own."""
        return (unlimited, unlimited) if self.window is None else (self.window - 1, 0)


class VarlenKernels(Protocol):
    """A library of attention kernels. Nothing is imported from it before it is called."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def has_softcap(self) -> bool:
        """Whether scores can be capped."""

    def __hash__(self) -> int: ...

    def unavailable(self) -> str | None:
        """Return the reason why the library cannot run here, or None if it can."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention. No gradient flows through this function.

        Args:
            query: (T, H, D) bfloat16 or float16; D is contiguous.
            key: (U, H', D), H a multiple of H'.
            value: As ``key``.
            varlen: Which queries see which keys.
            options: How scores are computed.

        Returns:
            out (T, H, D); lse (T, H) float32, the natural logarithm of the sum of e^score. Both are undefined for a query
            without keys.
        """

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of query, key and value from the gradient of the output.

        The kernels compute P = exp(score − lse), δ = Σ_d gradient · out and dS = P (dP − δ). So with the log-sum-exp and
        the output over more keys than those given here, the result is these keys' part of the gradient.

        Args:
            gradient: (T, H, D), of the output.
            query: As for `forward`; so are the arguments not named here.
            key: See there.
            value: See there.
            out: (T, H, D), the output over all keys.
            lse: (T, H) float32, the log-sum-exp over all keys.
            varlen: Which queries see which keys; without ``key_lengths``.
            options: See `forward`.

        Returns:
            The gradients of query, key and value, in their shapes and dtypes.
        """


def unsupported(kernels: VarlenKernels, query: Tensor, softcap: float | None) -> str | None:
    """Return the reason why a library does not support queries (T, H, D), or None if it does."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, and the input is {query.dtype}"
    dim = query.shape[2]
    if dim % 8 or dim > MAX_HEAD_DIM:
        return f"it needs a head dimension that is a multiple of 8, at most {MAX_HEAD_DIM}, and this one is {dim}"
    if softcap is not None and not kernels.has_softcap:
        return "it has no soft-cap"
    return None


def without_device(oldest: tuple[int, int], newest: tuple[int, int] | None = None) -> str | None:
    """Return the reason why there is no CUDA device of a compute capability in [oldest, newest), or None if there is."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < oldest or (newest is not None and capability >= newest):
        needs = f"{oldest[0]}.{oldest[1]}" + ("" if newest is None else f", below {newest[0]}.{newest[1]}")
        return f"the GPU has compute capability {capability[0]}.{capability[1]}: it needs {needs}"
    return None
