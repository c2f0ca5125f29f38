"""Which backend of `paged_attention` computes prefill on a GPU: the one that a timed trial on the device prefers.

The candidates are Triton, which also computes decode, and the libraries of `varlen_kernels`. The trial is run once for
each geometry of a model, at its first prefill: when a model is loaded, its attention is compared with transformers' own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alignpro_kernels import flash_attention, varlen_kernels
from alignpro_kernels.paged_keys import PagedKeys
from alignpro_kernels.timed_trial import Choice, choose
from alignpro_kernels.varlen import VarlenKernels

logger = logging.getLogger("alignpro_kernels")

ROWS_PER_SEGMENT = 4
"""A batch with at least this many queries per sequence of keys is a prefill. In decode, where each query has a last
sequence of its own, padding included there are at most two."""
_TRIAL_SEQUENCES = 16
_TRIAL_TOKENS = 256
"""Number and length of the prompts of a trial."""


class Geometry(NamedTuple):
    """What the speed of attention depends on in a model."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    softcap: bool

    @classmethod
    def of(cls, query: Tensor, pages: Tensor, softcap: float | None) -> Geometry:
        """The geometry of a call of `paged_attention`."""
        return cls(query.shape[1], pages.shape[3], query.shape[2], pages.shape[2], query.dtype, softcap is not None)

    def __str__(self) -> str:
        """Say it in words."""
        capped = ", capped" if self.softcap else ""
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.heads} heads on {self.kv_heads} of {self.head_dim}, pages of {self.page_size}, {name}{capped}"


class _Attention(Protocol):
    """A backend of `paged_attention`."""

    def __hash__(self) -> int: ...

    def __call__(
        self, query: Tensor, pages: Tensor, keys: PagedKeys, *, scale: float, softcap: float | None, window: int | None
    ) -> tuple[Tensor, Tensor]: ...


def is_prefill(query: Tensor, levels: Sequence[PagedKeys]) -> bool:
    """Whether queries (T, H, D) over some levels are a prefill, known from shapes; False while a graph is captured.

    Then nothing may be measured, and a captured batch must run what its uncaptured run has compiled.
    """
    if len(query) < ROWS_PER_SEGMENT * sum(len(level.key_lengths) for level in levels):
        return False
    return not (query.is_cuda and torch.cuda.is_current_stream_capturing())


def prefill_kernels(
    query: Tensor, pages: Tensor, keys: PagedKeys, softcap: float | None, window: int | None, base: _Attention
) -> VarlenKernels | None:
    """The library that computes one level of a prefill, or None for ``base``, which always runs."""
    if len(keys.query_positions) < ROWS_PER_SEGMENT * len(keys.key_lengths):
        return None
    libraries = [
        each
        for each in varlen_kernels.available()
        if flash_attention.unsupported(query, pages, keys, softcap, window, each) is None
    ]
    if not libraries:
        return None
    name = measured(Geometry.of(query, pages, softcap), query.device, base).name
    return next((each for each in libraries if each.name == name), None)


@functools.cache
def measured(geometry: Geometry, device: torch.device, base: _Attention) -> Choice:
    """The result of the trial of a geometry on a CUDA device; logged once."""
    with torch.cuda.device(device), torch.no_grad():
        choice = choose(trials(geometry, device, base, varlen_kernels.available()), synchronize=torch.cuda.synchronize)
    logger.info("prefill attention (%s) runs on %s", geometry, choice)
    return choice


def trials(
    geometry: Geometry, device: torch.device, base: _Attention, libraries: Sequence[VarlenKernels]
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """The prefill of a few prompts by each candidate; ``base`` is called triton."""
    count, tokens, size = _TRIAL_SEQUENCES, _TRIAL_TOKENS, geometry.page_size
    held = -(-tokens // size)  # pages of a prompt
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(geometry.dtype)

    def int32(values: Tensor) -> Tensor:
        return values.to(device, torch.int32)

    query = normal(count * tokens, geometry.heads, geometry.head_dim)
    pages = normal(count * held, 2, size, geometry.kv_heads, geometry.head_dim)
    keys = PagedKeys(
        cu_queries=int32(torch.arange(count + 1) * tokens),
        page_table=int32(torch.arange(count * held).view(count, held)),
        key_lengths=int32(torch.full((count,), tokens)),
        query_positions=int32(torch.arange(tokens).repeat(count)),
        key_starts=int32(torch.zeros(count)),
    )
    softcap = 50.0 if geometry.softcap else None
    scale = geometry.head_dim**-0.5

    def with_library(kernels: VarlenKernels) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: flash_attention.paged_attention(
            query, pages, keys, scale=scale, softcap=softcap, window=None, kernels=kernels
        )

    found = {"triton": lambda: base(query, pages, keys, scale=scale, softcap=softcap, window=None)}
    for kernels in libraries:
        if flash_attention.unsupported(query, pages, keys, softcap, None, kernels) is None:
            found[kernels.name] = with_library(kernels)
    return found
