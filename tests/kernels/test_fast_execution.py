"""Execution details of the fast backends change no result: chunks, threads, and the memory that they use and keep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fast_backends import FAST, OPERATORS, need
from head_problems import Problem, run

from alignpro_kernels import Coefficients, cpp_head, policy_loss
from alignpro_kernels.backends import backend_module

pytestmark = pytest.mark.usefixtures("runnable")
EVERYTHING = Problem(bias=True, rank=4, reference="separate", softcap=3.0, temperatures=True)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", FAST)
def test_chunks_change_only_the_rounding(operator: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(EVERYTHING, rows=150, zero_every=4, masked=True)
    whole = run(problem, operator, backend, torch.float32)
    for most in (1, 7, 64):
        monkeypatch.setattr(backend_module(backend), "max_chunk_rows", lambda head, dtype, most=most: most)
        parts = run(problem, operator, backend, torch.float32)
        for name, value in parts.values.items():
            torch.testing.assert_close(value, whole.values[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_inputs_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    problem = replace(EVERYTHING, rows=40)
    for operator in OPERATORS:
        first, second = (run(problem, operator, backend, dtype) for _ in range(2))
        for name, value in first.values.items():
            assert torch.equal(value, second.values[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_statistics_do_not_depend_on_the_number_of_threads(threads: int, set_threads: Callable[[int], None]) -> None:
    need("cpp")
    problem = Problem(rows=30, vocabulary=2000, reference="shared")
    set_threads(threads)
    exact = run(problem, "policy_loss", "reference", torch.float64)
    errors = run(problem, "policy_loss", "cpp", torch.float32).errors(exact)
    assert max(errors.values()) < 2e-5


def test_memory_does_not_grow_with_the_number_of_rows() -> None:
    need("cpp")
    script = Path(__file__).with_name("peak_memory.py")
    peaks = [
        int(subprocess.run([sys.executable, script, str(rows)], capture_output=True, text=True, check=True).stdout)
        for rows in (3072, 6144)
    ]
    assert max(peaks) < 256, peaks  # their logits are 470 and 940 MiB


def test_the_workspace_is_not_shared_by_nested_calls() -> None:
    need("cpp")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(48, 16, generator=generator), torch.randn(70_000, 16, generator=generator)
    target = torch.randint(70_000, (48,), generator=generator)

    def gradient(coefficients: Coefficients) -> torch.Tensor:
        states = hidden.clone().requires_grad_()
        policy_loss(states, weight, target, coefficients, backend="cpp").loss.backward()
        assert states.grad is not None
        return states.grad

    def plain(logprob: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return -logprob, -torch.ones_like(logprob), None, None

    def nested(logprob: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        with torch.enable_grad():  # while the outer call holds its logits
            inner.append(gradient(plain))
        return plain(logprob)

    cpp_head.release_workspace()
    fresh, inner = gradient(plain), []
    assert torch.equal(gradient(plain), fresh)  # reuses the first call's memory
    assert torch.equal(gradient(nested), fresh)
    assert torch.equal(inner[0], fresh)
    cpp_head.release_workspace()
    assert torch.equal(gradient(plain), fresh)
