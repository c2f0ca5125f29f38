"""Attention of one batch over the paged pool: shared prefixes are read once, then merged with each sequence's own keys.

The tokens of a batch are flattened in depth-first order of the prefix tree, so the queries below a node, including the
node's own, are contiguous rows. Each depth of the tree is one level of `cascade_attention`. At a level, every node is a
set of keys that its contiguous queries attend to, up to their own positions; so a prompt's keys are read once for all
the sequences that share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignpro.engine.host_copy import to_device
from alignpro.engine.pool import Geometry, KVPool, Segment
from alignpro.engine.scheduler import Chunk
from alignpro.engine.sequence_arrays import Ints
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
        ends: The segments at whose ends B sequences draw after the pass, which need not be computed in it.
        seeds: (B,) int64: the seeds of their next tokens.
        adapted: Name of the model whose tokens a token LoRA acts on; None if there is none.
    """

    def __init__(
        self,
        pool: KVPool,
        model: str,
        chunks: Sequence[Chunk],
        ends: Sequence[Segment],
        seeds: Ints,
        adapted: str | None,
    ) -> None:
        self.chunks = sorted(chunks, key=lambda chunk: [segment.serial for segment in chunk.path])
        counts = [chunk.count for chunk in self.chunks]
        row_ends = np.cumsum(counts)
        self.last_row = {id(each.segment): int(end) - 1 for each, end in zip(self.chunks, row_ends, strict=True)}
        """``id`` of a segment → the row of its last computed token."""
        ids = [token for chunk in self.chunks for token in chunk.segment.tokens[chunk.first : chunk.end]]
        starts = [chunk.segment.start + chunk.first for chunk in self.chunks]
        positions = np.repeat(np.array(starts) - (row_ends - counts), counts) + np.arange(len(ids))
        slots: list[int] = []
        for chunk in self.chunks:
            pages, first, count = chunk.segment.pages, chunk.first, chunk.count
            slots += pool.slots(model, pages, first, count) if chunk.write else [-1] * count
        self.not_computed = [end for end in ends if id(end) not in self.last_row]
        """Those of ``ends`` that are not computed in the pass."""
        behind = itertools.count(len(ids))
        drawn_rows = [self.last_row[id(end)] if id(end) in self.last_row else next(behind) for end in ends]
        owned = [adapted in (None, chunk.segment.model) for chunk in self.chunks]
        active = np.repeat(owned, counts).nonzero()[0]
        depths = range(max(len(chunk.path) for chunk in self.chunks))
        computed = {chunk.segment: chunk.end for chunk in self.chunks}
        levels = [_level(self.chunks, computed, depth, positions) for depth in depths]
        own = [np.array(ids), positions, np.array(slots), np.array(drawn_rows, np.int64), seeds, active]
        on_device = iter(to_device([*own, *(array for level in levels for array in level.values())], pool.device))
        self.ids, self.positions, slots_on_device, self.drawn_rows, self.seeds, active_rows = islice(
            on_device, len(own)
        )
        """(T,) int64 each; then for each of ``ends`` its row, the rows after the T tokens being those of `not_computed`; the
        seeds."""
        self.active: Tensor | bool = active_rows if any(owned) and not all(owned) else all(owned)
        """The rows that a token LoRA acts on, (A,) int64; True for all of them, False for none."""
        super().__init__(
            pool.layers(model),
            slots_on_device,  # (T,) int64
            [PagedKeys(**{name: next(on_device) for name in level}) for level in levels],
        )


def _level(
    chunks: Sequence[Chunk], ends: Mapping[Segment, int], depth: int, positions: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Build the cascade level of the segments at one depth of the chunks' paths. At depth 0 every token has a segment.

    ``ends`` are the lengths, after the batch, of the segments that it computes. Returns the fields of a `PagedKeys`.
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
    level = {
        "query_positions": positions[rows].astype(np.int32),
        "cu_queries": np.array(bounds, np.int32),
        "page_table": table,
        "key_lengths": np.array(lengths, np.int32),
        "key_starts": np.array(starts, np.int32),
    }
    return level if len(rows) == at else level | {"rows": np.array(rows)}


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
