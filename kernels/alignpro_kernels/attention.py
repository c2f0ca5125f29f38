"""Paged attention: attention over keys and values stored in the pages of a pool.

T is the number of query rows, H of query heads, D the head dimension, S the number of sequences.
`alignpro_kernels.pages` describes the layout of a pool.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from alignpro_kernels import attention_reference, flash_attention, triton_support
from alignpro_kernels.backends import BackendError
from alignpro_kernels.checks import FLOATS
from alignpro_kernels.operators import merge_states

logger = logging.getLogger("alignpro_kernels")

BACKENDS = ("triton", "cpp", "flash", "reference")


@torch.compiler.disable
@torch.no_grad()
def paged_attention(
    query: Tensor,
    pages: Tensor,
    cu_queries: Tensor,
    page_table: Tensor,
    key_lengths: Tensor,
    query_positions: Tensor,
    key_starts: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed sequences over paged keys and values; also returns the log-sum-exp of the scores.

    One call serves prefill (all tokens of a prompt are queries), chunked prefill (some of them are), decode (one query
    per sequence) and one level of a cascade. In a cascade, the queries that share a node of a prefix tree form one
    "sequence" whose keys are the node's; `merge_states` then merges the result with the attention to their own keys.
    Scores, statistics and sums are float32 (float64 for float64 inputs), computed by the online softmax of Milakov and
    Gimelshein (2018) as in FlashAttention (Dao et al., 2022). A query's result depends only on that query and its keys:
    backend ``cpp`` gives the same bits in any batch, with any chunking and any number of threads. No gradient flows
    through this function.

    Args:
        query: (T, H, D) float64, float32, bfloat16 or float16; rows and heads may be strided.
        pages: (n_pages, 2, page_size, kv_heads, D), one layer's view of the arena, keys before values; same dtype as
            ``query``. The last dimension must be contiguous, the other strides are arbitrary. H must be a multiple of
            kv_heads: query head h reads head h // (H / kv_heads). Slots that no query sees may hold anything, even NaN.
        cu_queries: (S + 1,) int32: sequence s has the query rows cu_queries[s] to cu_queries[s + 1]. On the device of
            ``query`` or on the CPU.
        page_table: (S, max_pages) int32: key j of sequence s is in page page_table[s, j // page_size] at j % page_size.
            Entries beyond a sequence's keys may be anything.
        key_lengths: (S,) int32: the number of keys of each sequence; may be 0.
        query_positions: (T,) int32. A query sees the keys whose position is at most its own.
        key_starts: (S,) int32: key j of sequence s has position key_starts[s] + j; None for 0.
        scale: Scores are scale · q · k.
        softcap: Scores become softcap · tanh(scores / softcap) (Gemma 2).
        window: A query sees only the last ``window`` positions, including its own.
        backend: ``auto``, ``triton`` (CUDA and ROCm), ``cpp`` (CPUs, built on first use), ``flash`` (CUDA, if the
            package flash-attn is installed; see `flash_attention` for the queries it supports) or ``reference``
            (anywhere; loops over the sequences and synchronises with the device). ``triton`` and ``flash`` never
            synchronise, so they do not check values: the caller must pass valid ones.

    Returns:
        out (T, H, D) in the dtype of ``query``; lse (T, H), the natural logarithm of the sum of e^score. A query that
        sees no key gets out 0 and lse −inf.

    Raises:
        ValueError, TypeError: An argument has the wrong shape, layout, device, value or dtype; the message names it.
        BackendError: The backend cannot run.
    """
    _check_call(query, pages, softcap, window)
    _check_keys(query, len(query), cu_queries, page_table, key_lengths, query_positions, key_starts)
    out, lse = _module(_choose(backend, query, pages, window)).paged_attention(
        query,
        pages,
        cu_queries,
        page_table,
        key_lengths,
        query_positions,
        key_starts,
        scale=scale,
        softcap=softcap,
        window=window,
    )
    return out, lse


@dataclass(frozen=True)
class CascadeLevel:
    """S sets of keys, each seen by a contiguous range of this level's R queries, out of the T of `cascade_attention`."""

    rows: Tensor | None
    """(R,) int64: indices of this level's queries, ascending; None for all T queries."""
    query_positions: Tensor
    """(R,) int32."""
    cu_queries: Tensor
    """(S + 1,) int32: set s is seen by rows cu_queries[s] to cu_queries[s + 1]."""
    page_table: Tensor
    """(S, max_pages) int32."""
    key_lengths: Tensor
    """(S,) int32."""
    key_starts: Tensor
    """(S,) int32: position of the first key."""

    def __post_init__(self) -> None:
        """Check that the fields are consistent, once for the calls of all layers.

        Raises:
            ValueError, TypeError: A field has the wrong shape, device or dtype; the message names it.
        """
        rows, positions = self.rows, self.query_positions
        if rows is not None and (rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != positions.device):
            raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}: expected (R,) int64")
        _check_keys(
            positions,
            len(positions) if rows is None else len(rows),
            self.cu_queries,
            self.page_table,
            self.key_lengths,
            positions,
            self.key_starts,
        )


@torch.compiler.disable
@torch.no_grad()
def cascade_attention(
    query: Tensor,
    pages: Tensor,
    levels: Sequence[CascadeLevel],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`paged_attention` over several sets of keys per query, merged by their log-sum-exp.

    Queries that share a prompt attend to it together, and to their own keys separately: o = Σ softmax(lse) · o_level
    over the levels that a query appears in (Hydragen, Juravsky et al., 2024; cascade inference, Ye et al., 2024). The
    partial results are merged in float32; backend ``cpp`` does so while they are in the cache.

    Args:
        query: (T, H, D), see `paged_attention`.
        pages: See `paged_attention`.
        levels: At least one, the keys shared by most queries first; a query appears at most once in each level.
        scale: See `paged_attention`.
        softcap: See `paged_attention`.
        window: See `paged_attention`.
        backend: See `paged_attention`.

    Returns:
        (T, H, D) in the dtype of ``query``; 0 for a query that sees no key in any level.

    Raises:
        ValueError, TypeError, BackendError: As for `paged_attention`.
    """
    if not levels:
        raise ValueError("levels is empty: at least one set of keys is needed")
    _check_call(query, pages, softcap, window)
    for level in levels:
        _check_rows(level, query)
    chosen = _choose(backend, query, pages, window)
    if chosen == "cpp":
        out: Tensor = _module(chosen).cascade_attention(
            query, pages, levels, scale=scale, softcap=softcap, window=window
        )
        return out
    parts = [
        paged_attention(
            query if level.rows is None else query.index_select(0, level.rows),
            pages,
            level.cu_queries,
            level.page_table,
            level.key_lengths,
            level.query_positions,
            level.key_starts,
            scale=scale,
            softcap=softcap,
            window=window,
            backend=chosen,
        )
        for level in levels
    ]
    if len(parts) > 1 and all(level.rows is None for level in levels):
        outs, lses = zip(*parts, strict=True)
        return merge_states(outs, lses)
    whole = parts[0]
    if levels[0].rows is not None:
        nothing = torch.zeros_like(query), whole[1].new_full(query.shape[:2], -torch.inf)
        whole = _concatenate(nothing, whole, levels[0].rows)
    for level, part in zip(levels[1:], parts[1:], strict=True):
        whole = _concatenate(whole, part, level.rows)
    return whole[0]


def _concatenate(
    whole: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor], rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge the attention so far, (T, H, D) and its log-sum-exp (T, H), with that of ``rows`` to further keys."""
    if rows is None:
        return merge_states((whole[0], part[0]), (whole[1], part[1])), torch.logaddexp(whole[1], part[1])
    before = (whole[0].index_select(0, rows), whole[1].index_select(0, rows))
    both = _concatenate(before, part, None)
    return whole[0].index_copy(0, rows, both[0]), whole[1].index_copy(0, rows, both[1])


def _choose(backend: str, query: Tensor, pages: Tensor, window: int | None) -> str:
    """Return the requested backend, or for ``auto`` the best one for the query; each choice is logged once."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(
            f"paged_attention: there is no backend {backend!r}: use 'auto' or one of {', '.join(BACKENDS)}"
        )
    name = backend
    if backend == "auto":
        name = {"cpu": "cpp", "cuda": "triton"}.get(query.device.type, "reference")  # ROCm devices are "cuda" too
    reason = _unsupported(name, query, pages, window)
    if reason is not None:
        if backend != "auto":
            raise BackendError(f"paged_attention: backend {name!r} cannot run here: {reason}")
        _log_choice("reference", f"{name} cannot run: {reason}")
        return "reference"
    _log_choice(name, None)
    return name


@functools.cache
def _module(name: str) -> ModuleType:
    # Imported lazily: cpp needs torch.utils.cpp_extension, which is slow to import, and Triton may be missing.
    return attention_reference if name == "reference" else import_module(f"alignpro_kernels.{name}_attention")


def _unsupported(name: str, query: Tensor, pages: Tensor, window: int | None) -> str | None:
    """Return the reason why a backend cannot run on this query, or None if it can."""
    if name == "reference":
        return None
    if query.dtype == torch.float64:
        return "it computes in float32, and the input is float64"
    if name == "triton":
        if (reason := triton_support.unavailable()) is not None:
            return reason
        if triton_support.takes(query.device):
            return None
        return f"it runs on CUDA and ROCm devices, and the input is on {query.device}"
    if name == "flash":
        return flash_attention.unavailable() or flash_attention.unsupported(query, pages, window)
    if query.device.type != "cpu":
        return f"it runs on the CPU, and the input is on {query.device}"
    from alignpro_kernels import cpp_attention

    return cpp_attention.unavailable()


@functools.cache
def _log_choice(backend: str, reason: str | None) -> None:
    logger.info("paged_attention runs on backend %s%s", backend, "" if reason is None else f", because {reason}")


def _check_call(query: Tensor, pages: Tensor, softcap: float | None, window: int | None) -> None:
    _check_states(query, pages)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: it must be positive, or None to disable it")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: it must be positive, or None to disable it")


def _check_keys(
    like: Tensor,
    count: int,
    cu_queries: Tensor,
    page_table: Tensor,
    key_lengths: Tensor,
    query_positions: Tensor,
    key_starts: Tensor | None,
) -> None:
    _check_index("key_lengths", key_lengths, ("S",), like)
    sequences = len(key_lengths)
    _check_index("cu_queries", cu_queries, (sequences + 1,), like, host=True)
    _check_index("page_table", page_table, (sequences, "max_pages"), like)
    _check_index("query_positions", query_positions, (count,), like)
    if key_starts is not None:
        _check_index("key_starts", key_starts, (sequences,), like)


def _check_rows(level: CascadeLevel, query: Tensor) -> None:
    """Check that a level fits the queries of the call."""
    count = len(level.query_positions)
    if (level.rows is None and count != len(query)) or level.query_positions.device != query.device:
        raise ValueError(
            f"query has {len(query)} rows on {query.device}, but a level has positions for {count} rows on "
            f"{level.query_positions.device}"
        )


def _check_states(query: Tensor, pages: Tensor) -> None:
    if query.dtype not in FLOATS:
        raise TypeError(f"query is {query.dtype}: expected one of {', '.join(map(str, FLOATS))}")
    if pages.dtype != query.dtype:
        raise TypeError(f"pages is {pages.dtype} and query is {query.dtype}: they must agree")
    if pages.device != query.device:
        raise ValueError(f"pages is on {pages.device} and query is on {query.device}: they must agree")
    if pages.ndim != 5 or pages.shape[1] != 2 or not pages.numel():
        raise ValueError(
            f"pages has shape {tuple(pages.shape)}: expected (n_pages, 2, page_size, kv_heads, D), not empty"
        )
    if pages.stride(-1) != 1 and pages.shape[-1] > 1:
        raise ValueError(f"pages has strides {pages.stride()}: the elements of a key must be contiguous")
    kv_heads, dim = pages.shape[3:]
    if query.ndim != 3 or query.shape[2] != dim or not query.shape[1] or query.shape[1] % kv_heads:
        raise ValueError(
            f"query has shape {tuple(query.shape)}: expected (T, H, {dim}) with H a multiple of the {kv_heads} heads of "
            "pages"
        )


def _check_index(name: str, index: Tensor, shape: tuple[int | str, ...], like: Tensor, *, host: bool = False) -> None:
    """Check dtype, shape and device of an index; a name in ``shape`` allows any size, ``host`` also allows the CPU."""
    if index.dtype != torch.int32:
        raise TypeError(f"{name} is {index.dtype}: expected {torch.int32}")
    if index.ndim != len(shape) or any(a != b for a, b in zip(index.shape, shape, strict=True) if isinstance(b, int)):
        raise ValueError(f"{name} has shape {tuple(index.shape)}: expected ({', '.join(map(str, shape))})")
    if index.device != like.device and not (host and index.device.type == "cpu"):
        raise ValueError(f"{name} is on {index.device} and query on {like.device}: they must agree")
