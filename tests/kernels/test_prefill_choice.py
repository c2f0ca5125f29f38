"""Which kernels compute prefill on a GPU: what counts as one, what takes part in the trial, and what its result changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from documented_kernels import LIBRARIES
from torch import Tensor

from alignpro_kernels import (
    PagedKeys,
    attention,
    attention_reference,
    cascade_attention,
    prefill_choice,
    varlen_kernels,
)
from alignpro_kernels.prefill_choice import Geometry, is_prefill, prefill_kernels, trials
from alignpro_kernels.timed_trial import Choice, choose
from alignpro_kernels.varlen_reference import ReferenceKernels


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_choice, "_TRIAL_TOKENS", 40)


GEOMETRY = Geometry(4, 2, 16, 16, torch.bfloat16, softcap=False)


class Library(ReferenceKernels):
    """The reference under a name; counts its calls."""

    def __init__(self, name: str, *, has_softcap: bool = True) -> None:
        self.name, self.has_softcap, self.calls = name, has_softcap, 0  # type: ignore[misc]

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().forward(*args, **options)


def level(counts: list[int], lengths: list[int], rows: Tensor | None = None) -> PagedKeys:
    """Queries at the last keys of sequences that are one page each."""

    def int32(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    positions = [p for count, length in zip(counts, lengths, strict=True) for p in range(length - count, length)]
    return PagedKeys(
        int32([0, *counts]).cumsum(0).int(),
        int32([[s] for s in range(len(counts))]),
        int32(lengths),
        int32(positions),
        int32([0] * len(counts)),
        rows,
    )


def inputs(tokens: int, pages: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shape = (pages, 2, GEOMETRY.page_size, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    return torch.randn(tokens, 4, 16).bfloat16(), torch.randn(shape).bfloat16()


def test_a_prefill_is_known_from_shapes() -> None:
    query, _ = inputs(16, 1)
    assert is_prefill(query, [level([16], [16])])
    assert is_prefill(query, [level([8, 8], [16, 16]), level([16], [16])])
    assert not is_prefill(query, [level([4] * 4, [16] * 4), level([16], [16])])  # few queries per sequence
    assert not is_prefill(query, [level([1] * 16, [16] * 16)])  # decode
    assert not is_prefill(query, [level([16], [16]), level([1] * 16, [16] * 16)])  # decode below a shared prompt


def test_the_candidates_compute_the_same() -> None:
    found = trials(GEOMETRY, torch.device("cpu"), attention_reference.paged_attention, [Library("a"), Library("b")])
    assert list(found) == ["triton", "a", "b"]
    times = iter([0, 3, 3, 6, 6, 9, 9, 12, 12, 15, 15, 17, 17, 19, 19, 21, 21, 23, 23, 25, *range(25, 35)])
    choice = choose(found, clock=lambda: float(next(times)))
    assert not choice.reasons and set(choice.seconds) == {"triton", "a", "b"}
    assert choice.name == "b"


def test_a_library_without_what_a_model_needs_takes_no_part() -> None:
    libraries = [Library("a"), Library("b", has_softcap=False)]
    device, base = torch.device("cpu"), attention_reference.paged_attention
    assert list(trials(GEOMETRY._replace(softcap=True), device, base, libraries)) == ["triton", "a"]
    assert list(trials(GEOMETRY._replace(dtype=torch.float32), device, base, libraries)) == ["triton"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Let a trial have chosen a library, and Triton be the reference."""
    library = Library("fast")
    monkeypatch.setattr(varlen_kernels, "available", lambda: [LIBRARIES["torch"], library])
    monkeypatch.setattr(prefill_choice, "measured", lambda *_: Choice(library.name, {}, {}))
    monkeypatch.setattr(attention, "_choose", lambda *_: "triton")
    monkeypatch.setattr(attention, "_module", lambda _: attention_reference)
    return library


def test_prefill_runs_on_what_the_trial_chose(chosen: Library) -> None:
    """Also where a part of the batch has no keys at a level; and decode does not."""
    query, pages = inputs(16, 2)
    levels = [level([16], [16]), level([12], [12], torch.arange(4, 16))]
    got = cascade_attention(query, pages, levels, scale=0.25, in_order=True)
    assert chosen.calls == 4  # two groups of queries at each level
    expected = cascade_attention(query, pages, levels, scale=0.25, backend="reference")
    assert chosen.calls == 4
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
    cascade_attention(query, pages, levels, scale=0.25)  # positions in any order
    cascade_attention(query[:2], pages, [level([1, 1], [5, 9])], scale=0.25, in_order=True)
    cascade_attention(query, pages, levels, scale=0.25, window=4, in_order=True)
    assert chosen.calls == 4


def test_a_level_with_few_queries_stays_with_triton(chosen: Library) -> None:
    query, pages = inputs(32, 3)
    levels = [level([32], [16]), level([1, 2], [16, 16], torch.arange(3))]
    base = attention_reference.paged_attention
    assert prefill_kernels(query, pages, levels[0], None, None, base) is chosen
    assert prefill_kernels(query[:3], pages, levels[1], None, None, base) is None


def test_triton_stays_where_it_is_fastest(chosen: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_choice, "measured", lambda *_: Choice("triton", {}, {}))
    query, pages = inputs(16, 1)
    cascade_attention(query, pages, [level([16], [16])], scale=0.25, in_order=True)
    assert chosen.calls == 0


def test_the_geometry_in_words() -> None:
    assert str(GEOMETRY) == "4 heads on 2 of 16, pages of 16, bfloat16"
    query, pages = inputs(3, 1)
    assert Geometry.of(query, pages, None) == GEOMETRY
    assert Geometry.of(query, pages, 30.0) == GEOMETRY._replace(softcap=True)
