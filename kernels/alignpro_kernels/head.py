"""The interface between the chunk loop (`fused`) and a backend: a head, a chunk of rows, and the gradients to fill.

A backend is a module with these functions. C is the number of rows in a chunk, A the number of active rows.

``max_chunk_rows(head, dtype) -> int``
    The maximum number of rows per chunk, from a memory budget.
``logits_buffer_rows(head) -> int``
    How many rows of logits fit into the memory of the weight's gradient before it is first written; 0 if unsupported.
``empty_weight_gradient(head) -> Tensor``
    That memory, (V, D) in `stats_dtype`; required if ``logits_buffer_rows`` is not 0.
``forward(head, rows, *, entropy, save_logits, logits_buffer) -> (RowStats, saved)``
    Statistics (C,) from float32 accumulators. ``saved`` is what ``backward`` needs, or None without ``save_logits``.
    ``logits_buffer``, passed only if ``logits_buffer_rows`` is used, is the ``empty_weight_gradient`` in which to store
    the logits.
``backward(head, rows, saved, stats, upstream, gradients) -> None``
    Fills or adds to ``gradients``; at least one row is active. ``saved`` may be overwritten.
``sample(head, rows, seeds) -> SampleOutput``
    One token per row, (C,); ``seeds`` (C,) int64; a temperature may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MIN_LOGPROB = -1e30
"""Replaces a log-probability of −∞ before it is multiplied by its probability: 0 · −∞ is NaN, 0 · LOWEST is 0."""


class Head(NamedTuple):
    """The output layers of the policy and of its reference."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,)"""
    softcap: float | None = None
    """Logits become softcap · tanh(logits / softcap), for policy and reference."""
    lora_b: Tensor | None = None
    """(V, r): B of a LoRA, which applies to the policy only."""
    ref_weight: Tensor | None = None
    """(V, D'); the same tensor as ``weight`` when the head is shared; None without a reference."""
    ref_bias: Tensor | None = None
    """(V,): the reference's bias, also set if the head is shared."""

    @property
    def shared(self) -> bool:
        """Whether policy and reference read one weight."""
        return self.ref_weight is self.weight

    @property
    def logits_per_row(self) -> int:
        """The number of logits kept for each row of a chunk."""
        return self.weight.shape[0] * (1 if self.ref_weight is None else 2)


class Rows(NamedTuple):
    """A chunk of C tokens; all tensors are contiguous."""

    hidden: Tensor
    """(C, D) in the head's dtype, or on a CPU float32 with a 16-bit head."""
    target: Tensor | None
    """(C,) int64 in [0, V); None when sampling."""
    temperature: float | Tensor
    """τ: a number, or (C,) in `stats_dtype`."""
    lora_hidden: Tensor | None = None
    """(C, r): scale · h Aᵀ of a LoRA, in `stats_dtype` on a CPU, in the dtype of ``hidden`` for a GPU."""
    ref_hidden: Tensor | None = None
    """(C, D') in the dtype of ``hidden``."""

    def select(self, index: Tensor | slice) -> Rows:
        """Return the given rows."""
        return Rows(*(x[index] if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


class RowStats(NamedTuple):
    """Statistics of a chunk's rows, constants in `stats_dtype`."""

    logprob: Tensor
    """(C,)"""
    entropy: Tensor | None
    """(C,) if requested."""
    kl: Tensor | None
    """(C,) with a reference."""
    softmax_stats: Tensor
    """(2 or more, C): m, the largest logit, and log Σ e^{z−m}; with a reference, the third and fourth row are its own. They
    are stored separately so that an offset of the logits costs no precision. If all logits of a row are −∞, m may be −∞
    or 0."""


class Upstream(NamedTuple):
    """The derivatives of the loss with respect to the statistics of a chunk's rows; None means zero."""

    active: Tensor | None
    """(A,) int64, ascending: the rows with a nonzero derivative; None means all."""
    alpha: Tensor | None
    """(C,): with respect to the log-probability."""
    eta: Tensor | None
    """(C,): with respect to the entropy."""
    kappa: Tensor | None
    """(C,): with respect to the KL."""


@dataclass
class HeadGradients:
    """The tensors that receive a chunk's gradients; a gradient that is None is not computed."""

    hidden: Tensor | None
    """(C, D) in the dtype of the hidden states: every row is written, inactive ones with zero."""
    lora_hidden: Tensor | None
    """(C, r) in its own dtype, likewise: the gradient of `Rows.lora_hidden`."""
    weight: Tensor | None
    """(V, D) in `stats_dtype`, summed over all chunks."""
    bias: Tensor | None
    """(V,), likewise."""
    lora_b: Tensor | None
    """(V, r), likewise."""
    accumulate: bool
    """Whether ``weight``, ``bias`` and ``lora_b`` hold the sum of earlier chunks; otherwise they are overwritten."""


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and accumulators for inputs of a dtype: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """Convert to `stats_dtype`."""
    return x.to(stats_dtype(x.dtype))
