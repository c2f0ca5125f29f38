"""Attention of one batch over the paged pool: shared prefixes are read once, then merged with each sequence's own keys.

The tokens of a batch are flattened in depth-first order of the prefix tree, so the queries below a node, including the
node's own, are contiguous rows. Each depth of the tree is one level of `cascade_attention`. At a level, every node is a
set of keys that its contiguous queries attend to, up to their own positions; so a prompt's keys are read once for all
the sequences that share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignpro.engine.pool import Geometry, KVPool, Segment
from alignpro.engine.scheduler import Chunk
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention, layer_keys
from alignpro_kernels import PagedKeys


class AttentionPlan(PagedAttention):
    """The attention metadata of a batch, shared by all layers; built once, before the forward pass.

    Args:
        pool: Holds the keys and values.
        model: Name of the model that runs.
        chunks: The chunks to compute, in any order.
        device: Where the index tensors are placed.
    """

    def __init__(self, pool: KVPool, model: str, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks = sorted(chunks, key=lambda chunk: [segment.serial for segment in chunk.path])
        counts = [chunk.count for chunk in self.chunks]
        ends = np.cumsum(counts)
        self.last_row = {id(chunk.segment): int(end) - 1 for chunk, end in zip(self.chunks, ends, strict=True)}
        """``id`` of a segment → the row of its last computed token."""
        self._counts = counts
        ids = [token for chunk in self.chunks for token in chunk.segment.tokens[chunk.first : chunk.end]]
        starts = [chunk.segment.start + chunk.first for chunk in self.chunks]
        positions = np.repeat(np.array(starts) - (ends - counts), counts) + np.arange(len(ids))
        slots: list[int] = []
        for chunk in self.chunks:
            pages, first, count = chunk.segment.pages, chunk.first, chunk.count
            slots += pool.slots(model, pages, first, count) if chunk.write else [-1] * count
        self.ids = torch.tensor(ids, device=device)  # (T,) int64
        self.positions = torch.from_numpy(positions).to(device)  # (T,) int64
        depths = range(max(len(chunk.path) for chunk in self.chunks))
        computed = {chunk.segment: chunk.end for chunk in self.chunks}
        super().__init__(
            pool.layers(model),
            torch.tensor(slots, device=device),  # (T,) int64
            [_level(self.chunks, computed, depth, positions, device) for depth in depths],
        )

    def rows_of(self, model: str) -> Tensor | bool:
        """The rows of the tokens that belong to a model, (A,) int64; True if all of them do, False if none does."""
        owned = [chunk.segment.model == model for chunk in self.chunks]
        if all(owned) or not any(owned):
            return owned[0]
        return torch.from_numpy(np.repeat(owned, self._counts).nonzero()[0]).to(self.ids.device)


def _level(
    chunks: Sequence[Chunk],
    ends: Mapping[Segment, int],
    depth: int,
    positions: np.ndarray[Any, Any],
    device: torch.device,
) -> PagedKeys:
    """Build the cascade level of the segments at one depth of the chunks' paths. At depth 0 every token has a segment.

    ``ends`` are the lengths, after the batch, of the segments that it computes.
    """
    tables: list[list[int]] = []
    lengths: list[int] = []
    starts: list[int] = []
    bounds = [0]
    rows: list[int] = []
    at = 0
    serials = [chunk.path[depth].serial if len(chunk.path) > depth else None for chunk in chunks]
    for serial, group in groupby(range(len(chunks)), key=serials.__getitem__):
        members = [chunks[i] for i in group]
        count = sum(chunk.count for chunk in members)
        if serial is not None:
            segment = members[0].path[depth]
            tables.append(segment.pages)
            lengths.append(ends.get(segment, segment.computed))
            starts.append(segment.start)
            rows.extend(range(at, at + count))
            bounds.append(len(rows))
        at += count
    table = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for line, pages in zip(table, tables, strict=True):
        line[: len(pages)] = pages

    def int32(values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(device)

    return PagedKeys(
        rows=None if len(rows) == at else torch.tensor(rows, device=device),
        query_positions=int32(positions[rows]),
        cu_queries=int32(bounds),
        page_table=int32(table),
        key_lengths=int32(lengths),
        key_starts=int32(starts),
    )


def probe_geometry(model: LanguageModel) -> Geometry:
    """Find the KV-cache geometry of a model by running it on one token.

    Raises:
        ModelError: The model's keys and values differ in shape, its layers differ in dtype, or they are not numbered
            from 0.
    """
    try:
        layers = layer_keys(model)
    except ValueError as error:
        raise ModelError(f"model {model.name}: {error}, which the engine does not support") from error
    return Geometry(tuple((layer.heads, layer.head_dim) for layer in layers), layers[0].dtype)
