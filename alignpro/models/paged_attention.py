"""Attention of tokens to keys and values in a paged pool, in every layer of a model; what such a pool must hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignpro.models.attention_interface import AttentionBackend, AttentionSettings
from alignpro_kernels import PagedKeys, cascade_attention, write_kv


@dataclass
class PagedAttention:
    """An `AttentionBackend` that writes the keys and values of T tokens to the pool, then attends over cascade levels."""

    layers: Sequence[Tensor]
    """Each layer's pages, (n_pages, 2, page_size, kv_heads, head_dim)."""
    slots: Tensor
    """(T,) int64: the slot each token's key and value are written to; −1 to write nothing."""
    levels: Sequence[PagedKeys]
    """One per depth of the prefix tree."""
    in_order: bool = True
    """Whether the queries of a segment are its last tokens, in order, without padding; see `cascade_attention`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        pages = self.layers[layer]
        write_kv(keys.contiguous(), values.contiguous(), pages, self.slots)
        out = cascade_attention(
            queries,
            pages,
            self.levels,
            scale=settings.scale,
            softcap=settings.softcap,
            window=settings.sliding_window,
            in_order=self.in_order,
        )
        return out.unsqueeze(0)


class _Runs(Protocol):
    """What is run of a `LanguageModel`; see there."""

    @property
    def device(self) -> torch.device: ...
    def token_states(self, ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor: ...


@dataclass(frozen=True)
class LayerKeys:
    """The form of a layer's keys and values."""

    heads: int
    head_dim: int
    dtype: torch.dtype


class _Recorder:
    """Records the form of keys and values. It is run on a single token, whose attention output is simply its value."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerKeys] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        if key.shape != value.shape:
            raise ValueError("its keys and values differ in shape")
        self.layers[layer] = LayerKeys(key.shape[1], key.shape[3], key.dtype)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


@torch.no_grad()
def layer_keys(model: _Runs) -> list[LayerKeys]:
    """Find the form of the keys and values of each layer by running a model on one token.

    Raises:
        ValueError: They cannot be kept in one pool: keys and values differ in shape, layers differ in dtype, or they are
            not numbered from 0.
    """
    recorder, token = _Recorder(), torch.zeros(1, dtype=torch.int64, device=model.device)
    model.token_states(token, token, recorder)
    numbers = sorted(recorder.layers)
    layers = [recorder.layers[number] for number in numbers]
    if numbers != list(range(len(layers))) or len({layer.dtype for layer in layers}) != 1:
        raise ValueError(f"its layers {numbers} cannot share one pool of pages")
    return layers


@torch.no_grad()
def paged_trial(
    model: _Runs,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    attention: Callable[[Sequence[Tensor], Tensor, Sequence[PagedKeys]], AttentionBackend] = PagedAttention,
) -> Tensor:
    """Compute the states of sequences that share a prompt as generation does, (T, D): the prompt's, then each completion's.

    All tokens but the last of each completion are computed in one pass, the last ones in a second.

    Args:
        model: The model.
        prompt: Token ids; −1 for the virtual tokens of a soft prompt.
        completions: Token ids of each completion, at least one each.
        attention: Makes the attention of a pass from the layers' pages, the slots and the levels.

    Raises:
        ValueError: As `layer_keys`.
    """
    device, start = model.device, len(prompt)
    size = max(16, 1 << (max(start, *map(len, completions)) - 1).bit_length())  # a segment fits in one page
    pages = [
        torch.zeros(1 + len(completions), 2, size, keys.heads, keys.head_dim, dtype=keys.dtype, device=device)
        for keys in layer_keys(model)
    ]

    def run(first: list[int], counts: list[int], *, with_prompt: bool) -> Tensor:
        """Compute ``counts`` tokens of each completion from ``first`` on, after the prompt's if they are to be computed."""
        own = start if with_prompt else 0
        ids, positions, slots = list(prompt[:own]), list(range(own)), list(range(own))
        for page, (completion, begin, count) in enumerate(zip(completions, first, counts, strict=True), 1):
            ids += completion[begin : begin + count]
            positions += range(start + begin, start + begin + count)
            slots += range(page * size + begin, page * size + begin + count)

        def int32(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        bounds = [0, *itertools.accumulate(counts)]
        ends = [begin + count for begin, count in zip(first, counts, strict=True)]
        rows = torch.arange(own, len(ids), device=device) if own else None
        levels = [
            PagedKeys(int32([0, len(ids)]), int32([[0]]), int32([start]), int32(positions), int32([0])),
            PagedKeys(
                int32(bounds),
                int32([[page] for page in range(1, len(pages[0]))]),
                int32(ends),
                int32(positions[own:]),
                int32([start] * len(counts)),
                rows,
            ),
        ]
        tokens, where, at = (torch.tensor(each, device=device) for each in (ids, positions, slots))
        return model.token_states(tokens, where, attention(pages, at, levels))

    before = [len(each) - 1 for each in completions]
    prefilled, *parts = run([0] * len(before), before, with_prompt=True).split([start, *before])
    decoded = run(before, [1] * len(before), with_prompt=False)
    return torch.cat(
        [prefilled, *(x for part, last in zip(parts, decoded.split(1), strict=True) for x in (part, last))]
    )
