"""Backend ``flash``: variable-length calls over copies of paged keys give the attention of a walk down a prefix tree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import documented_kernels
import pytest
import torch
from attention_problems import Problem, assert_as_exact_as_plain, in_pages, new_problem
from documented_kernels import LIBRARIES
from torch import Tensor

from alignpro_kernels import BackendError, PagedKeys, flash_attention, paged_attention


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the libraries as documented, on the CPU."""
    documented_kernels.install(monkeypatch)


def walk(counts: list[int], below: list[int], lengths: list[int], **shape: Any) -> Problem:
    """Return sequences with ``counts`` queries at the last keys and ``below`` queries after all keys."""
    both = [a + b for a, b in zip(counts, below, strict=True)]
    problem = new_problem(both, lengths, **{"page_size": 16, "dim": 32, "dtype": torch.bfloat16} | shape)
    positions = [
        position
        for start, length, a, b in zip(problem.starts, lengths, counts, below, strict=True)
        for position in [*range(start + length - a, start + length), *range(start + length + b, start + length, -1)]
    ]
    return replace(problem, positions=torch.tensor(positions, dtype=torch.int32))


def run(problem: Problem, library: str = "flash-attn 2", device: str = "cpu") -> tuple[Tensor, Tensor]:
    return flash_attention.paged_attention(
        *problem.arguments(device),
        scale=problem.scale,
        softcap=problem.softcap,
        window=None,
        kernels=LIBRARIES[library],
    )


PROBLEMS = {
    "prompts": ([5, 300, 1], [0, 0, 0], [5, 700, 256]),
    "a shared node, one being computed, and a piece of one": ([0, 4, 3], [6, 2, 0], [300, 4, 40]),
    "nodes without keys or queries": ([0, 0, 2], [3, 0, 1], [0, 9, 9]),
    "a decode step": ([1, 1, 1, 0], [0, 0, 0, 1], [1, 257, 30, 0]),
    "one query": ([1], [0], [20]),
}


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_calls_are_right_by_the_documentation(name: str, library: str) -> None:
    for softcap in (None, 3.0) if LIBRARIES[library].has_softcap else (None,):
        torch.manual_seed(0)
        problem = walk(*PROBLEMS[name], softcap=softcap)
        assert_as_exact_as_plain(problem, *run(problem, library))


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("page_size", [1, 7, 256])
def test_any_page_size(page_size: int) -> None:
    torch.manual_seed(0)
    problem = walk([0, 4, 3], [6, 2, 0], [300, 4, 40], page_size=page_size)
    assert_as_exact_as_plain(problem, *run(problem))


@pytest.mark.usefixtures("documented")
def test_padding_attends_to_nothing_and_has_no_effect() -> None:
    torch.manual_seed(0)
    problem = walk([0, 1, 2], [3, 2, 2], [300, 30, 40])
    positions = problem.positions.clone()
    positions[-2:] = -1
    problem = replace(problem, positions=positions)
    out, lse = run(problem)
    assert_as_exact_as_plain(problem, out, lse)
    assert bool((lse[-2:] == -torch.inf).all())


@pytest.mark.usefixtures("documented")
def test_a_query_at_an_inexpressible_position_is_nan_and_others_are_not() -> None:
    torch.manual_seed(0)
    problem = walk([3, 2], [0, 2], [40, 300])
    positions = problem.positions.clone()
    positions[1] -= 1
    out, lse = run(replace(problem, positions=positions))
    expected, _ = run(problem)
    assert bool(out[1].isnan().all()) and bool(lse[1].isnan().all())
    others = [0, *range(2, len(out))]
    assert torch.equal(out[others], expected[others])


@pytest.mark.usefixtures("documented")
def test_unused_slots_may_hold_anything() -> None:
    """They hold NaN in all problems here. The page table may also be wider than necessary."""
    problem = walk([1, 1], [0, 0], [3, 5])
    pages, table = in_pages(problem.keys, problem.values, 16, "arena")
    wide = torch.nn.functional.pad(table.clamp_min(0), (0, 3))
    assert_as_exact_as_plain(problem, *run(replace(problem, pages=pages, page_table=wide)))


def test_unsupported_inputs_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = new_problem([1, 2], [20, 5])
    if flash_attention.unavailable() is not None:
        with pytest.raises(BackendError, match=r"backend 'flash' cannot run here: .*no CUDA device"):
            problem.run("flash")

    def reason(window: int | None = None, library: str = "flash-attn 3", **shape: Any) -> str:
        problem = new_problem([1], [5], **{"dtype": torch.bfloat16} | shape)
        keys = PagedKeys(**problem.indices())
        kernels = LIBRARIES[library]
        return flash_attention.unsupported(problem.query, problem.pages, keys, problem.softcap, window, kernels) or ""

    assert reason() == reason(softcap=3.0) == reason(library="torch") == ""
    assert "takes bfloat16 and float16, and the input is torch.float32" in reason(dtype=torch.float32)
    assert "multiple of 8, at most 256, and this one is 20" in reason(dim=20)
    assert "no soft-cap" in reason(softcap=3.0, library="torch")
    assert "window" in reason(window=100)
    monkeypatch.setattr(flash_attention, "COPY_LIMIT", 100)
    assert "it copies the keys, and these take" in reason()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_installed_libraries(name: str, library: str) -> None:
    kernels = LIBRARIES[library]
    if (reason := kernels.unavailable()) is not None:
        pytest.skip(reason)
    for softcap in (None, 3.0) if kernels.has_softcap else (None,):
        torch.manual_seed(0)
        problem = walk(*PROBLEMS[name], softcap=softcap, heads=8)
        problem = replace(problem, page_table=problem.page_table.clamp_min(0))
        out, lse = run(problem, library, "cuda")
        assert_as_exact_as_plain(problem, out.cpu(), lse.cpu())
        if flash_attention.unavailable() is None:
            paged_attention(*problem.arguments("cuda"), scale=problem.scale, softcap=problem.softcap, backend="flash")
