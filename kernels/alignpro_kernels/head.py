"""What passes between the chunk loop (`fused`) and a backend: a head, a chunk of rows, and where gradients go.

A backend is a module with these functions; C is the number of rows of a chunk, A of those that are active.

``rows_in_flight(head, dtype) -> int``
    The most rows of one chunk, from a budget of memory.
``rows_in_gradient(head) -> int``
    Rows of a chunk whose logits can be kept in the memory of the weight's gradient before that is begun; 0 for none.
``weight_gradient(head) -> Tensor``
    Such memory, (V, D) in `statistics_dtype`, where ``rows_in_gradient`` is not 0.
``forward(head, rows, *, entropy, keep, room) -> (RowStats, kept)``
    Statistics (C,) from float32 accumulators; ``kept`` is what ``backward`` needs, if ``keep``, else None. ``room``, which
    is passed where there is one, is the ``weight_gradient`` in which to keep it.
``backward(head, rows, kept, stats, active, alpha, eta, kappa, gradients) -> None``
    Fills or adds to ``gradients``. ``stats`` are those of the whole vocabulary, where ``head`` is a slice of it.
    ``active`` (A,) int64, ascending, are the rows with a coefficient that is not zero, at least one; None means all. A
    coefficient is (C,) or None for zero. ``kept`` may be overwritten.
``sample(head, rows, seeds) -> SampleOutput``
    A token a row, (C,); ``seeds`` (C,) int64; a temperature may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -1e30
"""What stands for a log-probability of −∞ where it is multiplied by its probability: 0 · −∞ is NaN, 0 · LOWEST is 0."""


@dataclass(frozen=True)
class Head:
    """The output layers of the policy and of its reference."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None = None
    """(V,)"""
    softcap: float | None = None
    """Logits become softcap · tanh(logits / softcap), for policy and reference."""
    low_rank: Tensor | None = None
    """(V, r): B of a LoRA, which the reference does not have."""
    ref_weight: Tensor | None = None
    """(V, D'); the same tensor as ``weight`` when the head is shared; None without a reference."""
    ref_bias: Tensor | None = None
    """(V,), of the reference: that of the shared head too."""

    @property
    def shared(self) -> bool:
        """Whether policy and reference read one weight."""
        return self.ref_weight is self.weight

    @property
    def logits_per_row(self) -> int:
        """How many logits a row of a chunk keeps."""
        return self.weight.shape[0] * (1 if self.ref_weight is None else 2)


@dataclass(frozen=True)
class Rows:
    """A chunk of C tokens; all contiguous."""

    hidden: Tensor
    """(C, D) in the head's dtype."""
    target: Tensor | None
    """(C,) int64; None when sampling. Outside of [0, V) where the head is a slice that lacks it: its log-probability over
    the slice then means nothing."""
    temperature: float | Tensor
    """τ: a number, or (C,) in `statistics_dtype`."""
    low_rank: Tensor | None = None
    """(C, r) in the head's dtype: scale · h Aᵀ of a LoRA."""
    ref_hidden: Tensor | None = None
    """(C, D') in the head's dtype."""

    def select(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return Rows(
            hidden=self.hidden[index],
            target=pick(self.target),
            temperature=self.temperature[index] if isinstance(self.temperature, Tensor) else self.temperature,
            low_rank=pick(self.low_rank),
            ref_hidden=pick(self.ref_hidden),
        )


class RowStats(NamedTuple):
    """Statistics of a chunk's rows, constants in `statistics_dtype`."""

    logprob: Tensor
    """(C,)"""
    entropy: Tensor | None
    """(C,) where asked for."""
    kl: Tensor | None
    """(C,) with a reference."""
    norms: Tensor
    """(2 or more, C): m, the largest logit, and log Σ e^{z−m}; with a reference in the third and fourth row its own. They
    are apart so that an offset of the logits costs no precision. In a row of −∞ alone m may be −∞ or 0."""


@dataclass
class HeadGradients:
    """Where the gradients of a chunk go; None where none is wanted, so that none is computed."""

    hidden: Tensor | None
    """(C, D) in its dtype or in `statistics_dtype`: every row is written, inactive ones with zero."""
    low_rank_rows: Tensor | None
    """(C, r), likewise: the gradient of `Rows.low_rank`."""
    weight: Tensor | None
    """(V, D) in `statistics_dtype`, over all chunks."""
    bias: Tensor | None
    """(V,), likewise."""
    low_rank: Tensor | None
    """(V, r), likewise."""
    accumulate: bool
    """Whether the last three hold the sum of earlier chunks; if not, they hold nothing and are overwritten."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What log-probabilities and accumulators of inputs of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """In `statistics_dtype`."""
    return x.to(statistics_dtype(x.dtype))
