"""Backend ``flash``: calls of flash-attn agree with its signatures and documentation, and with the package if installed.

Without the package, its two functions are implemented here as documented, behind the recorded signatures.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_problems import Problem, assert_as_exact_as_plain, in_pages, new_problem
from torch import Tensor

from alignpro_kernels import BackendError, flash_attention, paged_attention

RECORD = json.loads((Path(__file__).parent / "flash_attn_signatures.json").read_text())
INSTALLED = importlib.util.find_spec("flash_attn") is not None


def signature(name: str) -> inspect.Signature:
    """Return a function's signature as recorded from the source distribution."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        inspect.Parameter(parameter, kind, default=inspect.Parameter.empty if text is None else ast.literal_eval(text))
        for parameter, text in RECORD["functions"][name].items()
    )


def attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend from query (n, H, D) to keys (m, H', D) → (n, H, D), (H, n); the causal mask is aligned to the bottom right.

    A query without keys gets 0 and +∞.
    """
    n, m, group = len(query), len(keys), query.shape[1] // keys.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    z = scale * torch.einsum("nhd,mhd->hnm", query.float(), k)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    if causal:
        seen = torch.arange(m) <= torch.arange(n)[:, None] + (m - n)
        z = z.masked_fill(~seen, -torch.inf)
    lse = z.logsumexp(-1)  # (H, n)
    out = torch.einsum("hnm,mhd->nhd", z.softmax(-1).nan_to_num(0.0), v)
    return out.to(query.dtype), torch.where(lse == -torch.inf, torch.inf, lse)


def gathered(cache: Tensor, line: Tensor, length: int) -> Tensor:
    """Return keys or values (length, H', D) from pages (n, page_size, H', D) by one line of a block table."""
    assert cache.shape[1] % 256 == 0 and cache.stride(-1) == 1
    return cache[line[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def varlen(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    bounds_q, bounds_k = (a[f"cu_seqlens_{which}"].tolist() for which in "qk")
    assert a["cu_seqlens_q"].dtype == a["cu_seqlens_k"].dtype == a["block_table"].dtype == torch.int32
    assert len(bounds_q) == len(bounds_k) == len(a["block_table"]) + 1 and bounds_q[-1] == len(a["q"])
    assert a["window_size"] == (-1, -1) and a["dropout_p"] == 0 and a["return_attn_probs"]
    outs, lses = [], []
    for s, line in enumerate(a["block_table"]):
        length = bounds_k[s + 1] - bounds_k[s]
        rows = a["q"][bounds_q[s] : bounds_q[s + 1]]
        assert len(rows) <= a["max_seqlen_q"] and length <= a["max_seqlen_k"] and a["max_seqlen_q"] > 1
        k, v = (gathered(a[name], line, length) for name in "kv")
        out, lse = attention(rows, k, v, a["softmax_scale"], a["softcap"], a["causal"])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1), torch.empty(0)


def with_kvcache(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    assert a["cache_seqlens"].dtype == a["block_table"].dtype == torch.int32 and a["return_softmax_lse"]
    assert a["k"] is None and a["window_size"] == (-1, -1) and not a["causal"]
    results = []
    for query, line, length in zip(a["q"], a["block_table"], a["cache_seqlens"].tolist(), strict=True):
        k, v = (gathered(a[name], line, length) for name in ("k_cache", "v_cache"))
        results.append(attention(query, k, v, a["softmax_scale"], a["softcap"], False))
    outs, lses = zip(*results, strict=True)
    return torch.stack(outs), torch.stack(lses)


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install flash-attn's functions as documented, on the CPU."""
    module = ModuleType("flash_attn")
    functions: dict[str, Callable[[dict[str, Any]], object]] = {
        "flash_attn_varlen_func": varlen,
        "flash_attn_with_kvcache": with_kvcache,
    }
    for name, function in functions.items():

        def call(_name: str = name, _function: Any = function, **arguments: Any) -> object:
            bound = signature(_name).bind(**arguments)
            bound.apply_defaults()
            return _function(bound.arguments)

        setattr(module, name, call)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def walk(counts: list[int], below: list[int], lengths: list[int], **shape: Any) -> Problem:
    """Return sequences with ``counts`` queries at the last keys and ``below`` queries after all keys."""
    both = [a + b for a, b in zip(counts, below, strict=True)]
    problem = new_problem(both, lengths, page_size=256, dim=32, dtype=torch.bfloat16, **shape)
    positions = [
        position
        for start, length, a, b in zip(problem.starts, lengths, counts, below, strict=True)
        for position in [*range(start + length - a, start + length), *range(start + length + b, start + length, -1)]
    ]
    return replace(problem, positions=torch.tensor(positions, dtype=torch.int32))


def run(problem: Problem, device: str = "cpu") -> tuple[Tensor, Tensor]:
    arguments = problem.arguments(device)
    if device == "cpu":
        return flash_attention.paged_attention(*arguments, scale=problem.scale, softcap=problem.softcap, window=None)
    return paged_attention(*arguments, scale=problem.scale, softcap=problem.softcap, backend="flash")


PROBLEMS = {
    "prompts": ([5, 300, 1], [0, 0, 0], [5, 700, 256]),
    "a shared node, one being computed, and a piece of one": ([0, 4, 3], [6, 2, 0], [300, 4, 40]),
    "nodes without keys or queries": ([0, 0, 2], [3, 0, 1], [0, 9, 9]),
    "a decode step": ([1, 1, 1, 0], [0, 0, 0, 1], [1, 257, 30, 0]),
    "one query": ([1], [0], [20]),
}


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_calls_are_right_by_the_documentation(name: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    problem = walk(*PROBLEMS[name], softcap=softcap)
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
    pages, table = in_pages(problem.keys, problem.values, 256, "arena")
    wide = torch.nn.functional.pad(table.clamp_min(0), (0, 3))
    assert_as_exact_as_plain(problem, *run(replace(problem, pages=pages, page_table=wide)))


def test_unsupported_inputs_are_refused_with_the_reason() -> None:
    problem = new_problem([1, 2], [20, 5])
    if flash_attention.unavailable() is not None:
        with pytest.raises(BackendError, match=r"backend 'flash' cannot run here: .*(not installed|no CUDA device)"):
            problem.run("flash")

    def reason(window: int | None = None, **shape: Any) -> str | None:
        problem = new_problem([1], [5], **{"page_size": 256, "dtype": torch.bfloat16} | shape)
        return flash_attention.unsupported(problem.query, problem.pages, window)

    assert reason() is None and reason(page_size=512) is None
    assert "multiple of 256 tokens, and these pages have 16" in (reason(page_size=16) or "")
    assert "takes bfloat16 and float16, and the input is torch.float32" in (reason(dtype=torch.float32) or "")
    assert "multiple of 8, at most 256, and this one is 20" in (reason(dim=20) or "")
    assert "window" in (reason(window=100) or "")


@pytest.mark.skipif(not INSTALLED, reason="the package flash-attn is not installed")
@pytest.mark.parametrize("name", RECORD["functions"])
def test_the_installed_package_has_the_recorded_parameters(name: str) -> None:
    flash_attn = pytest.importorskip("flash_attn", exc_type=ImportError)
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    missing = set(RECORD["functions"][name]) - set(parameters)
    assert not missing, f"flash-attn {flash_attn.__version__} has no {missing}, which {RECORD['version']} has"


@pytest.mark.gpu
@pytest.mark.skipif(flash_attention.unavailable() is not None, reason=str(flash_attention.unavailable()))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_installed_package(name: str, softcap: float | None) -> None:
    torch.manual_seed(0)
    problem = walk(*PROBLEMS[name], softcap=softcap, heads=8)
    problem = replace(problem, page_table=problem.page_table.clamp_min(0))
    out, lse = run(problem, "cuda")
    assert_as_exact_as_plain(problem, out.cpu(), lse.cpu())
