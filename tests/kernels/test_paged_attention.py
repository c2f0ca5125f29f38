"""Paged attention: its error against float64 relative to plain PyTorch's, and changes that must keep all bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_problems import (
    DTYPES,
    LAYOUTS,
    assert_as_exact_as_plain,
    cascade,
    check_empty_inputs,
    in_pages,
    new_problem,
    part,
    plain,
)
from fewer_instructions import FEWER, run_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alignpro_kernels import (
    BackendError,
    PagedKeys,
    attention,
    backends,
    cascade_attention,
    cpp_library,
    merge_states,
    paged_attention,
)

BACKENDS = ("cpp", "reference")

needs_cpp = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 150)), min_size=1, max_size=4),
    group=st.sampled_from([1, 2, 3, 5, 8]),
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from([1, 5, 8, 16, 32, 40, 96]),
    dtype=st.sampled_from(DTYPES),
    page_size=st.sampled_from([1, 4, 16, 64]),
    layout=st.sampled_from(LAYOUTS),
    softcap=st.sampled_from([None, 3.0]),
    window=st.sampled_from([None, 1, 7, 64, 1000]),
    seed=st.integers(0, 2**31),
)
def test_as_exact_as_plain_attention(backend: str, sizes: list[tuple[int, int]], seed: int, **shape: Any) -> None:
    """Any shape and layout; unused slots hold NaN, and unused entries of the page table are out of range."""
    torch.manual_seed(seed)
    counts, lengths = (list(x) for x in zip(*sizes, strict=True))
    problem = new_problem(counts, lengths, heads=shape.pop("group") * shape["kv_heads"], **shape)
    assert_as_exact_as_plain(problem, *problem.run(backend))


@needs_cpp
@pytest.mark.parametrize("loudness", [1.0, 10.0])
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_in_several_parts(dtype: torch.dtype, window: int | None, loudness: float) -> None:
    """Also if a few keys have all the weight."""
    torch.manual_seed(0)
    problem = new_problem([3, 1, 20], [1300, 513, 1024], dtype=dtype, window=window, loudness=loudness)
    assert_as_exact_as_plain(problem, *problem.run())


def test_the_reference_is_plain_attention() -> None:
    torch.manual_seed(0)
    problem = new_problem([3, 9, 0, 4], [40, 17, 5, 0], window=11)
    for exact, got in zip(problem.exact(), plain(problem, torch.float64), strict=True):
        torch.testing.assert_close(exact, got.double(), rtol=1e-12, atol=1e-12)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """Queries give the same bits alone, in chunks, with another page size and in another layout."""
    torch.manual_seed(0)
    problem = new_problem([5, 40, 1, 13], [700, 90, 64, 1100], heads=6, dtype=dtype, window=800)
    out, lse = problem.run()
    for sequence, count in enumerate(problem.counts):
        first = sum(problem.counts[:sequence])
        rows = [slice(i, i + 1) for i in (0, count // 2, count - 1)]
        for chunk in [*rows, slice(0, count // 3 + 1), slice(count // 3, count)]:
            alone = replace(problem, page_size=(3, 16, 64)[sequence % 3], layout=LAYOUTS[sequence % 3])
            got_out, got_lse = part(alone, sequence, chunk).run()
            there = slice(first + chunk.start, first + chunk.stop)
            assert torch.equal(got_out, out[there])
            assert torch.equal(got_lse, lse[there])


@needs_cpp
def test_the_number_of_threads_does_not_matter(set_threads: Callable[[int], None]) -> None:
    """One long sequence, whose keys are divided among threads, in a batch of short ones; and a single query."""
    torch.manual_seed(0)
    problem = new_problem([2] + [1] * 12, [2100] + [50] * 12, kv_heads=1)
    single = part(problem, 0, slice(0, 1))
    results = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        results.append((*problem.run(), *single.run()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(results[0][2], results[0][0][:1])


@needs_cpp
def test_masked_keys_do_not_affect_a_query() -> None:
    torch.manual_seed(0)
    problem = new_problem([30], [90], window=40)
    out, lse = problem.run()
    for at in (0, 31, 70, 89):
        keys, values = problem.keys[0].clone(), problem.values[0].clone()
        keys[at], values[at] = torch.nan, torch.inf
        pages, table = in_pages([keys], [values], problem.page_size, problem.layout)
        got_out, got_lse = replace(problem, pages=pages, page_table=table).run()
        distance = problem.positions - problem.starts[0] - at
        blind = (distance < 0) | (distance >= 40)
        assert torch.equal(got_out[blind], out[blind])
        assert torch.equal(got_lse[blind], lse[blind])
        assert bool(got_out[~blind].isnan().all())


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cascade_gives_the_whole_attention(dtype: torch.dtype) -> None:
    """Siblings attend to their shared node as one sequence and to their suffixes separately; the results are merged."""
    torch.manual_seed(0)
    node, own, whole = cascade(75, [1, 9, 30, 64, 65, 0], dtype)
    (shared_out, shared_lse), (own_out, own_lse) = node.run(), own.run()
    merged = merge_states([shared_out, own_out], [shared_lse, own_lse])
    if dtype == torch.float32:
        assert_as_exact_as_plain(whole, merged, torch.logaddexp(shared_lse, own_lse))
    else:  # the two parts are rounded before they are merged
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(merged.double(), whole.exact()[0], rtol=tolerance, atol=tolerance)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_are_joined_in_one_call(dtype: torch.dtype) -> None:
    """Two nodes, one of them with a child, and a suffix for each query; one query attends to nothing."""
    torch.manual_seed(0)
    nodes, lower = [40, 75], [17]
    suffixes = [1, 9, 0, 64, 33, 0]
    problem = new_problem([1] * 6, suffixes, dtype=dtype)
    depths = [40, 40, 40, 92, 92, 0]
    starts = torch.tensor(depths, dtype=torch.int32)
    positions = starts + torch.tensor(suffixes, dtype=torch.int32)
    shared = [torch.randn(n, *problem.keys[0].shape[1:], dtype=dtype) for n in nodes + lower for _ in "kv"]
    keys, values = [*shared[::2], *problem.keys], [*shared[1::2], *problem.values]
    pages, table = in_pages(keys, values, 16, "arena")

    def int32(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    first, second = torch.arange(5), torch.tensor([3, 4])
    levels = [
        PagedKeys(int32(0, 3, 5), table[:2], int32(*nodes), positions[first], int32(0, 0), first),
        PagedKeys(int32(0, 2), table[2:3], int32(*lower), positions[second], int32(75), second),
        PagedKeys(torch.arange(7).int(), table[3:], int32(*suffixes), positions, starts),
    ]
    above = [[0], [0], [0], [1, 2], [1, 2], []]
    whole = [torch.cat([*(keys[i] for i in nodes_above), k]) for nodes_above, k in zip(above, keys[3:], strict=True)]
    whole_values = [torch.cat([*(values[i] for i in n), v]) for n, v in zip(above, values[3:], strict=True)]
    whole_pages, whole_table = in_pages(whole, whole_values, 16, "whole")
    plain = replace(
        problem, keys=whole, values=whole_values, starts=[0] * 6, positions=positions, pages=whole_pages,
        page_table=whole_table,
    )  # fmt: skip

    expected = plain.exact()[0]
    tolerance = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for backend in ("cpp", "reference"):
        out = cascade_attention(problem.query, pages, levels, scale=problem.scale, backend=backend)
        assert not out[5].any()
        torch.testing.assert_close(out[:5].double(), expected[:5], rtol=tolerance, atol=tolerance)
    for order in (levels[::-1], [levels[1], levels[2], levels[0]]):
        out = cascade_attention(problem.query, pages, order, scale=problem.scale, backend="cpp")
        torch.testing.assert_close(out[:5].double(), expected[:5], rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="levels is empty"):
        cascade_attention(problem.query, pages, [], scale=1.0)
    wrong = replace(levels[0], rows=first + 2)
    with pytest.raises(ValueError, match=r"rows: number 4 is 6, expected 0 to 5"):
        cascade_attention(problem.query, pages, [wrong], scale=1.0, backend="cpp")


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
def test_empty_inputs_give_empty_results(backend: str) -> None:
    check_empty_inputs(backend)


@needs_cpp
def test_a_nan_query_does_not_affect_others() -> None:
    torch.manual_seed(0)
    problem = new_problem([9], [100])
    problem = replace(problem, positions=torch.full((9,), 200, dtype=torch.int32))
    out, _ = problem.run()
    query = problem.query.clone()
    query[4, 1, 3] = torch.nan
    got, lse = replace(problem, query=query).run()
    rows = torch.ones(9, 4, dtype=torch.bool)
    rows[4, 1] = False
    assert torch.equal(got[rows], out[rows])
    assert bool(got[4, 1].isnan().all()) and bool(lse[4, 1].isnan())


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
def test_values_out_of_range_are_errors(backend: str) -> None:
    problem = new_problem([1, 2], [20, 5])

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            keys = PagedKeys(**(problem.indices() | changes))
            paged_attention(problem.query, problem.pages, keys, scale=1.0, backend=backend)

    def ints(*x: int) -> Tensor:
        return torch.tensor(x, dtype=torch.int32)

    refused("cu_queries goes from 0 to 2: expected from 0 to the number of queries, 3", cu_queries=ints(0, 1, 2))
    refused("cu_queries: sequence 1 goes from 4 to 3: it must not decrease", cu_queries=ints(0, 4, 3))
    refused("key_lengths: sequence 0 has 49 keys, expected 0 to 48", key_lengths=ints(49, 1))
    refused("key_lengths: sequence 1 has -1 keys", key_lengths=ints(20, -1))
    refused("page_table: entry 1 of sequence 1 is -1, expected 0 to 4", key_lengths=ints(20, 17))
    table = problem.page_table.clone()
    table[0, 1] = 5
    refused("page_table: entry 1 of sequence 0 is 5", page_table=table)


def test_errors_name_the_argument() -> None:
    problem = new_problem([1, 2], [20, 5])
    indices = problem.indices()
    good: dict[str, Any] = {"query": problem.query, "pages": problem.pages, "scale": 1.0} | indices

    def refused(error: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            arguments = good | changes
            keys = PagedKeys(**{name: arguments.pop(name) for name in indices})
            paged_attention(keys=keys, **arguments)

    refused(TypeError, r"query is torch\.int32", query=good["query"].int())
    refused(TypeError, r"pages is torch\.bfloat16 and query is torch\.float32", pages=good["pages"].bfloat16())
    refused(ValueError, "pages is on meta and query is on cpu", pages=good["pages"].to("meta"))
    refused(ValueError, r"pages has shape \(5, 2, 16, 64\)", pages=good["pages"].flatten(3))
    refused(ValueError, r"pages has shape \(0, 2, 16, 2, 32\)", pages=good["pages"][:0])
    refused(ValueError, "pages has strides .* must be contiguous", pages=good["pages"].mT.contiguous().mT)
    refused(ValueError, r"query has shape \(3, 4, 31\): expected \(T, H, 32\)", query=good["query"][..., 1:])
    refused(ValueError, r"H a multiple of the 2 heads", query=good["query"][:, :3])
    refused(ValueError, r"query has shape \(3, 128\)", query=good["query"].flatten(1))
    refused(TypeError, r"cu_queries is torch\.int64", cu_queries=good["cu_queries"].long())
    refused(ValueError, r"cu_queries has shape \(2,\): expected \(3\)", cu_queries=good["cu_queries"][1:])
    refused(ValueError, r"page_table has shape \(1, 3\): expected \(2, max_pages\)", page_table=good["page_table"][1:])
    refused(ValueError, r"key_lengths has shape \(2, 1\)", key_lengths=good["key_lengths"][:, None])
    refused(ValueError, "key_lengths is on meta", key_lengths=good["key_lengths"].to("meta"))
    refused(
        ValueError, r"query_positions has shape \(2,\): expected \(3\)", query_positions=good["query_positions"][1:]
    )
    refused(TypeError, r"key_starts is torch\.float32", key_starts=good["key_starts"].float())
    refused(ValueError, "softcap is 0: it must be positive", softcap=0)
    refused(ValueError, "window is 0: it must be positive", window=0)
    refused(
        BackendError, "there is no backend 'fast': use 'auto' or one of triton, cpp, flash, reference", backend="fast"
    )
    refused(
        BackendError,
        "backend 'cpp' cannot run here: it computes in float32, and the input is float64",
        query=good["query"].double(),
        pages=good["pages"].double(),
        backend="cpp",
    )


@needs_cpp
def test_which_backend_runs_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention._log_choice.cache_clear()
    problem = new_problem([1], [5])
    with caplog.at_level("INFO", "alignpro_kernels"):
        for _ in range(2):
            problem.run("auto")
            problem.exact()
    assert caplog.messages == ["paged_attention runs on backend cpp", "paged_attention runs on backend reference"]


@needs_cpp
def test_shapes_can_be_traced_and_no_gradient_flows() -> None:
    problem = new_problem([1, 2], [20, 5], dtype=torch.bfloat16)
    assert cpp_library.unavailable() is None
    with FakeTensorMode() as mode:
        query, pages, *indices = (
            mode.from_tensor(x) for x in (problem.query, problem.pages, *problem.indices().values())
        )
        lists = [[None], *([x] for x in indices)]
        out, lse = torch.ops.alignpro.cascade_attention(query, pages, *lists, 1.0, 0.0, 0)
    assert out.shape == problem.query.shape and out.dtype == torch.bfloat16
    assert lse.shape == out.shape[:2] and lse.dtype == torch.float32
    query, *rest = problem.arguments()
    assert not paged_attention(query.requires_grad_(), *rest, scale=1.0)[0].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("instructions", FEWER)
def test_the_same_holds_with_fewer_instructions(instructions: str) -> None:
    names = (
        "test_as_exact_as_plain_attention[cpp]",
        "test_long_sequences_in_several_parts",
        "test_a_query_does_not_depend_on_its_batch",
        "test_the_number_of_threads_does_not_matter",
        "test_masked_keys_do_not_affect_a_query",
        "test_a_nan_query_does_not_affect_others",
    )
    run_with(instructions, *(f"{__file__}::{name}" for name in names))
