"""Paged attention: attention over keys and values stored in the pages of a pool.

T is the number of query rows, H of query heads, D the head dimension, S the number of sequences.
`alignpro_kernels.pages` describes the layout of a pool.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels import attention_reference, flash_attention, prefill_choice, triton_support
from alignpro_kernels.backends import BackendError, unavailable
from alignpro_kernels.checks import FLOATS
from alignpro_kernels.operators import merge_states
from alignpro_kernels.paged_keys import PagedKeys

logger = logging.getLogger("alignpro_kernels")

BACKENDS = ("triton", "cpp", "flash", "reference")


@torch.compiler.disable
@torch.no_grad()
def paged_attention(
    query: Tensor,
    pages: Tensor,
    keys: PagedKeys,
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
        keys: The S sequences of keys, and the queries that see each. Its ``rows`` must be None.
        scale: Scores are scale · q · k.
        softcap: Scores become softcap · tanh(scores / softcap) (Gemma 2).
        window: A query sees only the last ``window`` positions, including its own.
        backend: ``auto``, ``triton`` (CUDA and ROCm), ``cpp`` (CPUs, built on first use), ``flash`` (CUDA: the newest
            flash-attn installed, else PyTorch's; see `flash_attention` for the queries it supports) or ``reference``
            (anywhere; loops over the sequences and synchronises with the device). ``triton`` and ``flash`` never
            synchronise, so they do not check values: the caller must pass valid ones.

    Returns:
        out (T, H, D) in the dtype of ``query``; lse (T, H), the natural logarithm of the sum of e^score. A query that
        sees no key gets out 0 and lse −inf.

    Raises:
        ValueError, TypeError: An argument has the wrong shape, layout, device, value or dtype; the message names it.
        BackendError: The backend cannot run.
    """
    _check_call(query, pages, [keys], softcap, window)
    if keys.rows is not None:
        raise ValueError("keys has rows: only cascade_attention takes keys that some of the queries do not see")
    chosen = _choose(backend, query, pages, [keys], softcap, window)
    return _level(chosen, query, pages, keys, prefill=False, scale=scale, softcap=softcap, window=window)


@torch.compiler.disable
@torch.no_grad()
def cascade_attention(
    query: Tensor,
    pages: Tensor,
    levels: Sequence[PagedKeys],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
    in_order: bool = False,
) -> Tensor:
    """`paged_attention` over several sets of keys per query, merged by their log-sum-exp.

    Queries that share a prompt attend to it together, and to their own keys separately: o = Σ softmax(lse) · o_level
    over the levels that a query appears in (Hydragen, Juravsky et al., 2024; cascade inference, Ye et al., 2024). The
    partial results are merged in float32; backend ``cpp`` does so while they are in the cache.

    Args:
        query: (T, H, D), see `paged_attention`.
        pages: See `paged_attention`.
        levels: At least one, the keys shared by most queries first. A query appears at most once in each level; ``rows``
            of a level say which ones do.
        scale: See `paged_attention`.
        softcap: See `paged_attention`.
        window: See `paged_attention`.
        backend: See `paged_attention`.
        in_order: Whether the queries of each sequence of a level are at the positions of its last keys, in order, and
            then behind all of them, as in a walk down a prefix tree. Then ``auto`` computes a prefill on a CUDA device
            with what `prefill_choice` has measured to be fastest; without it, and in decode, with ``triton``.

    Returns:
        (T, H, D) in the dtype of ``query``; 0 for a query that sees no key in any level.

    Raises:
        ValueError, TypeError, BackendError: As for `paged_attention`.
    """
    if not levels:
        raise ValueError("levels is empty: at least one set of keys is needed")
    _check_call(query, pages, levels, softcap, window)
    chosen = _choose(backend, query, pages, levels, softcap, window)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    if chosen == "cpp":
        out: Tensor = _module(chosen).cascade_attention(query, pages, levels, **options)[0]
        return out
    prefill = in_order and backend == "auto" and chosen == "triton" and prefill_choice.is_prefill(query, levels)
    parts = [
        _level(
            chosen,
            query if level.rows is None else query.index_select(0, level.rows),
            pages,
            level,
            prefill=prefill,
            **options,
        )
        for level in levels
    ]
    if len(parts) > 1 and all(level.rows is None for level in levels):
        outs, lses = zip(*parts, strict=True)
        return merge_states(outs, lses)
    merged = parts[0]
    if levels[0].rows is not None:
        nothing = torch.zeros_like(query), merged[1].new_full(query.shape[:2], -torch.inf)
        merged = _merge_level(nothing, merged, levels[0].rows)
    for level, part in zip(levels[1:], parts[1:], strict=True):
        merged = _merge_level(merged, part, level.rows)
    return merged[0]


def _level(
    chosen: str,
    query: Tensor,
    pages: Tensor,
    keys: PagedKeys,
    *,
    prefill: bool,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute one level by a backend, or for a prefill by the library that was measured to be faster, if there is one."""
    run = _module(chosen).paged_attention
    kernels = None
    if prefill:
        kernels = prefill_choice.prefill_kernels(query, pages, keys, softcap, window, run)
    elif chosen == "flash":
        kernels, _ = flash_attention.kernels_for(query, pages, keys, softcap, window)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    if kernels is not None:
        return flash_attention.paged_attention(query, pages, keys, kernels=kernels, **options)
    out, lse = run(query, pages, keys, **options)
    return out, lse


def _merge_level(
    merged: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor], rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Merge the attention so far, (T, H, D) and its log-sum-exp (T, H), with that of ``rows`` to further keys."""
    if rows is None:
        return merge_states((merged[0], part[0]), (merged[1], part[1])), torch.logaddexp(merged[1], part[1])
    before = (merged[0].index_select(0, rows), merged[1].index_select(0, rows))
    both = _merge_level(before, part, None)
    return merged[0].index_copy(0, rows, both[0]), merged[1].index_copy(0, rows, both[1])


def _choose(
    backend: str,
    query: Tensor,
    pages: Tensor,
    levels: Sequence[PagedKeys],
    softcap: float | None,
    window: int | None,
) -> str:
    """Return the requested backend, or for ``auto`` the best one for the query; each choice is logged once."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(
            f"paged_attention: there is no backend {backend!r}: use 'auto' or one of {', '.join(BACKENDS)}"
        )
    name = backend
    if backend == "auto":
        name = {"cpu": "cpp", "cuda": "triton"}.get(query.device.type, "reference")  # ROCm devices are "cuda" too
    reason = _unsupported(name, query, pages, levels, softcap, window)
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


def _unsupported(
    name: str,
    query: Tensor,
    pages: Tensor,
    levels: Sequence[PagedKeys],
    softcap: float | None,
    window: int | None,
) -> str | None:
    """Return the reason why a backend cannot run on this query, or None if it can."""
    if name == "reference":
        return None
    if query.dtype == torch.float64:
        return "it computes in float32, and the input is float64"
    if name == "triton":
        if (reason := unavailable("triton")) is not None:
            return reason
        if triton_support.supports(query.device):
            return None
        return f"it runs on CUDA and ROCm devices, and the input is on {query.device}"
    if name == "flash":
        reasons = (flash_attention.kernels_for(query, pages, level, softcap, window) for level in levels)
        return next((reason for kernels, reason in reasons if kernels is None), None)
    if query.device.type != "cpu":
        return f"it runs on the CPU, and the input is on {query.device}"
    return unavailable("cpp")


@functools.cache
def _log_choice(backend: str, reason: str | None) -> None:
    logger.info("paged_attention runs on backend %s%s", backend, "" if reason is None else f", because {reason}")


def _check_call(
    query: Tensor, pages: Tensor, levels: Sequence[PagedKeys], softcap: float | None, window: int | None
) -> None:
    _check_states(query, pages)
    for level in levels:
        level.check_queries(query)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: it must be positive, or None to disable it")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: it must be positive, or None to disable it")


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
