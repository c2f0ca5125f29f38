"""Backend ``triton`` of `paged_attention`, interpreted: its error against float64, relative to plain PyTorch's."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_problems import (
    DTYPES,
    assert_as_exact_as_plain,
    cascade,
    check_empty_inputs,
    in_pages,
    new_problem,
    part,
)

from alignpro_kernels import BackendError, PagedKeys, attention, merge_states, paged_attention, triton_configs

torch.set_num_threads(1)

PROBLEMS = {
    "ragged": {},
    "a key-value head each": {"heads": 3, "kv_heads": 3},
    "group of no power of two, keys of none": {"heads": 10, "kv_heads": 2, "dim": 20},
    "one key-value head for as many as a tile has rows": {"heads": 16, "kv_heads": 1, "dim": 8},
    "one key-value head for more": {"heads": 19, "kv_heads": 1, "dim": 40},
    "pages of one key": {"page_size": 1, "layout": "arena"},
    "pages of four, window": {"page_size": 4, "layout": "head-major", "window": 5},
    "window of one": {"window": 1},
    "window beyond all": {"window": 1 << 40},
    "soft-cap": {"softcap": 3.0, "loudness": 5.0},
    "soft-cap, window, keys of one entry": {"softcap": 2.0, "window": 17, "dim": 1},
}


@pytest.fixture(params=["whole", "parts"])
def parted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the keys into parts, or not."""
    monkeypatch.setattr(triton_configs, "SPLIT_WAVES", 0 if request.param == "whole" else 1000)


SINGLE, *HALF = DTYPES
IN_HALF = itertools.cycle(itertools.product(HALF, ("whole", "parts")))
"""The dtype only changes how entries are loaded and stored, so each problem takes one way of running in 16 bits in turn."""
IN_SINGLE = itertools.cycle((("whole", "parts"), ("parts", "whole")))
"""Likewise one of two ways in float32; the other is marked slow."""


def ways(name: str) -> list[Any]:
    """The dtypes of a problem, with its keys whole or in parts."""
    first, second = next(IN_SINGLE)
    half = next(IN_HALF)
    return [(name, SINGLE, first), pytest.param(name, SINGLE, second, marks=pytest.mark.slow), (name, *half)]


@pytest.mark.parametrize(
    ("name", "dtype", "parted"), [way for name in PROBLEMS for way in ways(name)], indirect=["parted"], ids=str
)
def test_as_exact_as_plain_attention(name: str, dtype: torch.dtype, parted: None) -> None:
    """Unused slots hold NaN, and unused entries of the page table are out of range."""
    torch.manual_seed(0)
    problem = new_problem([5, 0, 1, 3, 2], [40, 7, 21, 9, 0], dtype=dtype, **PROBLEMS[name])
    assert_as_exact_as_plain(problem, *problem.run("triton"))


def test_prefill_of_a_prompt() -> None:
    """Three tiles of rows, the last of them partial, over two blocks of keys."""
    torch.manual_seed(1)
    prompt = new_problem([21], [21])
    prompt = replace(prompt, starts=[0], positions=torch.arange(21, dtype=torch.int32))
    assert_as_exact_as_plain(prompt, *prompt.run("triton"))


def test_more_sequences_than_one_lookup_handles() -> None:
    torch.manual_seed(1)
    problem = new_problem([1] * 130, [i % 4 for i in range(130)], heads=2, kv_heads=1, dim=8)
    assert_as_exact_as_plain(problem, *problem.run("triton"))


@pytest.mark.usefixtures("parted")
def test_slots_between_the_windows_of_a_tile_have_no_effect() -> None:
    """The queries of one tile are far apart: no window covers the keys between them, which may be NaN."""
    torch.manual_seed(0)
    problem = new_problem([2], [90], window=4, heads=2, kv_heads=1)
    problem = replace(problem, starts=[0], positions=torch.tensor([8, 70], dtype=torch.int32))
    expected = problem.run("triton")
    assert_as_exact_as_plain(problem, *expected)
    keys, values = problem.keys[0].clone(), problem.values[0].clone()
    unseen = torch.ones(90, dtype=torch.bool)
    unseen[5:9] = unseen[67:71] = False
    keys[unseen] = values[unseen] = torch.nan
    pages, table = in_pages([keys], [values], problem.page_size, problem.layout)
    got = replace(problem, pages=pages, page_table=table).run("triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("parted")
def test_a_nan_query_does_not_affect_others() -> None:
    torch.manual_seed(0)
    problem = replace(new_problem([9], [40]), positions=torch.full((9,), 200, dtype=torch.int32))
    out, _ = problem.run("triton")
    query = problem.query.clone()
    query[4, 1, 3] = torch.nan
    got, lse = replace(problem, query=query).run("triton")
    rows = torch.ones(9, 4, dtype=torch.bool)
    rows[4, 1] = False
    assert torch.equal(got[rows], out[rows])
    assert bool(got[4, 1].isnan().all()) and bool(lse[4, 1].isnan())


def test_a_query_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    problem = new_problem([5, 1, 13], [70, 64, 30], heads=6, window=50)
    out, lse = problem.run("triton")
    for sequence, count in enumerate(problem.counts):
        first = sum(problem.counts[:sequence])
        got_out, got_lse = part(problem, sequence, slice(count // 2, count)).run("triton")
        there = slice(first + count // 2, first + count)
        torch.testing.assert_close(got_out, out[there], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got_lse, lse[there], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "window", "parted"),
    [(4, None, "parts"), (4, 9, "whole"), (32, 9, "parts"), (32, None, "whole")],  # 4 queries a tile, 2 tiles a query
    indirect=["parted"],
)
def test_padding_attends_to_nothing_and_has_no_effect(heads: int, window: int | None, parted: None) -> None:
    """As in a captured graph: padding queries at −1 after a sequence's own, empty sequences, a wide page table."""
    torch.manual_seed(0)
    problem = new_problem([1, 2, 1], [20, 7, 11], heads=heads, kv_heads=1, dim=8, window=window)
    out, lse = problem.run("triton")
    query, pages, keys = problem.arguments()
    nothing = torch.zeros(5, dtype=torch.int32)
    rows = torch.tensor([4, 0, 4, 1, 2, 3, 4, 4])  # a sequence without keys first; two queries of padding at the end
    padded_keys = PagedKeys(
        torch.tensor([0, 1, 3, 5, 8, 8, 8, 8], dtype=torch.int32),
        torch.nn.functional.pad(keys.page_table, (0, 2, 1, 3)),
        torch.cat([nothing[:1], keys.key_lengths, nothing[:3]]),
        torch.cat([keys.query_positions, -torch.ones(1, dtype=torch.int32)])[rows],
        torch.cat([nothing[:1], keys.key_starts, nothing[:3]]),
    )
    padded = paged_attention(
        torch.cat([query, torch.full((1, heads, 8), 7.0)])[rows],
        pages,
        padded_keys,
        scale=problem.scale,
        window=window,
        backend="triton",
    )
    there = torch.tensor([1, 3, 4, 5])
    for got, expected in zip(padded, (out, lse), strict=True):
        torch.testing.assert_close(got[there], expected, rtol=1e-5, atol=1e-6)
    elsewhere = torch.tensor([0, 2, 6, 7])
    assert not padded[0][elsewhere].any() and bool((padded[1][elsewhere] == -torch.inf).all())


def test_a_cascade_gives_the_whole_attention() -> None:
    torch.manual_seed(0)
    node, own, whole = cascade(35, [1, 9, 30, 0])
    (shared_out, shared_lse), (own_out, own_lse) = node.run("triton"), own.run("triton")
    merged = merge_states([shared_out, own_out], [shared_lse, own_lse])
    assert_as_exact_as_plain(whole, merged, torch.logaddexp(shared_lse, own_lse))


def test_empty_inputs_give_empty_results() -> None:
    check_empty_inputs("triton")


def test_strided_indices_and_queries() -> None:
    torch.manual_seed(0)
    problem = new_problem([3, 2], [30, 20])
    expected = problem.run("triton")
    indices = {name: torch.stack([x, x], -1)[..., 0] for name, x in problem.indices().items()}
    got = paged_attention(
        problem.query.transpose(1, 2).contiguous().transpose(1, 2),
        problem.pages,
        PagedKeys(**indices | {"page_table": problem.page_table.T.contiguous().T}),
        scale=problem.scale,
        backend="triton",
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_cpu_default_is_another_backend_and_float64_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    attention._log_choice.cache_clear()
    problem = new_problem([1], [5])
    with caplog.at_level("INFO", "alignpro_kernels"):
        problem.run("triton")
        problem.run("auto")
    assert caplog.messages[0] == "paged_attention runs on backend triton"
    assert "backend triton" not in caplog.messages[1]
    with pytest.raises(BackendError, match="backend 'triton' cannot run here: it computes in float32"):
        replace(problem, query=problem.query.double(), pages=problem.pages.double()).run("triton")
