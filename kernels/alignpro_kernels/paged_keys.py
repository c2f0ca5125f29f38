"""Which keys in the pages of a pool the queries of an attention call see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedKeys:
    """S sequences of keys, each seen by a contiguous range of R queries; one level of a cascade.

    The indices are on the device of the queries. Values are checked where they are on the host anyway.

    Raises:
        ValueError, TypeError: A field has the wrong shape, device or dtype; the message names it.
    """

    cu_queries: Tensor
    """(S + 1,) int32: sequence s is seen by the queries cu_queries[s] to cu_queries[s + 1]. May also be on the CPU."""
    page_table: Tensor
    """(S, max_pages) int32: key j of sequence s is in page page_table[s, j // page_size] at j % page_size. Entries beyond
    a sequence's keys may be anything."""
    key_lengths: Tensor
    """(S,) int32: the number of keys of each sequence; may be 0."""
    query_positions: Tensor
    """(R,) int32: a query sees the keys whose position is at most its own."""
    key_starts: Tensor
    """(S,) int32: key j of sequence s has position key_starts[s] + j."""
    rows: Tensor | None = None
    """(R,) int64, ascending: the indices of the queries among the T of `cascade_attention`; None for all T."""

    def __post_init__(self) -> None:
        rows, positions, sequences = self.rows, self.query_positions, len(self.key_lengths)
        self._check("key_lengths", self.key_lengths, ("S",))
        self._check("cu_queries", self.cu_queries, (sequences + 1,), host=True)
        self._check("page_table", self.page_table, (sequences, "max_pages"))
        self._check("query_positions", positions, ("R" if rows is None else len(rows),))
        self._check("key_starts", self.key_starts, (sequences,))
        if rows is not None and (rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != positions.device):
            raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}: expected (R,) int64")

    def check_queries(self, query: Tensor) -> None:
        """Check that the positions are those of the rows of ``query``, (T, H, D).

        Raises:
            ValueError: They are of another number, or on another device.
        """
        positions = self.query_positions
        if self.rows is None and len(positions) != len(query):
            raise ValueError(f"query_positions has shape {tuple(positions.shape)}: expected ({len(query)})")
        if positions.device != query.device:
            raise ValueError(f"query_positions is on {positions.device} and query on {query.device}: they must agree")

    def _check(self, name: str, index: Tensor, shape: tuple[int | str, ...], *, host: bool = False) -> None:
        """Check an index; a name in ``shape`` allows any size, ``host`` also allows the CPU."""
        if index.dtype != torch.int32:
            raise TypeError(f"{name} is {index.dtype}: expected {torch.int32}")
        if index.ndim != len(shape) or any(
            a != b for a, b in zip(index.shape, shape, strict=True) if isinstance(b, int)
        ):
            raise ValueError(f"{name} has shape {tuple(index.shape)}: expected ({', '.join(map(str, shape))})")
        device = self.query_positions.device
        if index.device != device and not (host and index.device.type == "cpu"):
            raise ValueError(f"{name} is on {index.device} and query_positions on {device}: they must agree")


def by_field(levels: Sequence[PagedKeys]) -> list[list[Tensor | None]]:
    """Return the fields of the levels as lists, in the order of the C++ operators."""
    names = ("rows", "cu_queries", "page_table", "key_lengths", "query_positions", "key_starts")
    return [[getattr(level, name) for level in levels] for name in names]
