"""The cosines and sines of a rotary embedding, looked up instead of computed: a decode step needs a few rows of them.

A transformers module computes them in a dozen small operations, which for a few tokens take half as long as the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MIN_POSITIONS = 256
_MAX_POSITIONS = 1 << 16
"""Positions from here on are computed."""
_FIXED = frozenset({"default", "linear", "llama3", "yarn"})
"""The kinds whose frequencies do not depend on the length of the sequence."""


class RotaryTable:
    """What a rotary embedding returns for each position, with the same bits.

    Args:
        rotary: A transformers module ``rotary(hidden, positions)``. If its frequencies may depend on the length of a
            sequence, or it is of an unknown kind, it is called as it is.
    """

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        kind, frequencies = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
        self._fixed = isinstance(kind, str) and kind in _FIXED and isinstance(frequencies, Tensor)
        self._cos = self._sin = torch.empty(0, 0)  # (positions, R)
        self._version: tuple[object, ...] = ()

    def __call__(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (T, R) each, of T positions (1, T) int64; ``hidden`` gives their dtype."""
        if not self._fixed or not positions.numel():
            return self._computed(hidden, positions)
        frequencies = self._rotary.inv_freq
        version = frequencies.data_ptr(), frequencies._version, self._rotary.attention_scaling, hidden.dtype
        if version != self._version:
            self._cos, self._version = torch.empty(0, 0), version
        at = positions[0]
        if len(self._cos):
            try:
                return self._cos.index_select(0, at), self._sin.index_select(0, at)
            except IndexError:  # beyond the end, which is rare: to look for it first would cost as much as the lookup
                pass
        last = int(at.max())
        if last >= _MAX_POSITIONS:
            return self._computed(hidden, positions)
        length = max(_MIN_POSITIONS, 1 << last.bit_length())
        self._cos, self._sin = self._computed(hidden, torch.arange(length)[None])
        return self._cos.index_select(0, at), self._sin.index_select(0, at)

    def _computed(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(hidden, positions)
        return cos[0], sin[0]
