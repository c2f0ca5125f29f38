"""The engine's key-value cache: slabs with room to grow, whose rows can be forked and dropped.

transformers' own layers concatenate: every decoded token copies all keys and values before it into fresh memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens by which a slab grows: large enough that growing costs little, small enough that little is held in vain."""


def slab_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model, with slabs where transformers would concatenate.

    Layers with a sliding window keep all their tokens too: their mask does the sliding.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        SlabLayer() if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer for layer in cache.layers
    ]
    return cache


class SlabLayer(DynamicLayer):
    """Keys and values of one layer.

    ``keys`` and ``values``, (B, H, S, D), are the used part of two slabs, (≥ B, H, ≥ S, D): new tokens are written
    behind it, and where rows are dropped, others are moved into their places.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens, (B, H, L, D) each; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._slabs = (key_states[:, :, :0], value_states[:, :, :0])
        rows, used = len(key_states), self.get_seq_length()
        total = used + key_states.shape[-2]
        if total > self._slabs[0].shape[-2]:
            self._slabs = (
                _grown(self._slabs[0][:rows, :, :used], total + ROOM),
                _grown(self._slabs[1][:rows, :, :used], total + ROOM),
            )
        for slab, states in zip(self._slabs, (key_states, value_states), strict=True):
            slab[:rows, :, used:total] = states
        return self._show(rows, total)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make row i what row ``indices[i]`` was, for each of (B',) indices; only rows that move are copied."""
        if not self.is_initialized:  # a layer that borrows the keys of another
            return
        rows, used = len(indices), self.get_seq_length()
        keys, values = self._slabs
        if rows > len(keys):
            self._slabs = (
                _grown(keys[indices, :, :used], used + ROOM),
                _grown(values[indices, :, :used], used + ROOM),
            )
        else:
            to = (indices != torch.arange(rows, device=indices.device)).nonzero().squeeze(-1)
            for slab in self._slabs:
                slab[to, :, :used] = slab[indices[to], :, :used]
        self._show(rows, used)

    def _show(self, rows: int, used: int) -> tuple[Tensor, Tensor]:
        keys, values = self._slabs
        self.keys, self.values = keys[:rows, :, :used], values[:rows, :, :used]
        return self.keys, self.values


def _grown(states: Tensor, length: int) -> Tensor:
    """A slab of ``length`` tokens that begins with ``states``, (B, H, S, D)."""
    rows, heads, used, width = states.shape
    slab = states.new_empty(rows, heads, length, width)
    slab[:, :, :used] = states
    return slab
