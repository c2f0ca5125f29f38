"""States rounded to bfloat16 for products with weights in bfloat16, as ALIGNPRO_CPU_BFLOAT16=rounded asks for.

The choice is made once per process, so the tests run in one of their own, here with the instructions of AVX512_BF16 where
the processor has them and with the same sums in float32 elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from fast_backends import need
from fewer_instructions import PYTORCH_NAMES
from torch import Tensor

from alignpro_kernels import cpp_library, linear_logprob, linear_sample
from alignpro_kernels.linear import pack_weight, packed_linear

ROUNDED = os.environ.get("ALIGNPRO_CPU_BFLOAT16") == "rounded"
inside = pytest.mark.skipif(not ROUNDED, reason="runs in a process of its own, below")
SHAPES = [(33, 24), (96, 160), (70, 578)]


@pytest.mark.skipif(ROUNDED, reason="starts the others")
@pytest.mark.parametrize("instructions", ["largest", pytest.param("generic", marks=pytest.mark.slow)])
def test_in_a_process_that_rounds(instructions: str) -> None:
    need("cpp")
    environment = os.environ | {"ALIGNPRO_CPU_BFLOAT16": "rounded", "OMP_NUM_THREADS": "1"}
    if instructions != "largest":
        environment["ATEN_CPU_CAPABILITY"] = PYTORCH_NAMES[instructions]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.split()[0].count(".") > 10  # they were not skipped


def test_an_unknown_choice_is_an_error() -> None:
    environment = os.environ | {"ALIGNPRO_CPU_BFLOAT16": "round"}
    command = [sys.executable, "-c", "from alignpro_kernels import cpp_library; cpp_library.unavailable()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "ALIGNPRO_CPU_BFLOAT16 is 'round': expected widened or rounded" in done.stderr


def narrow(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def check(found: Tensor, exact: Tensor) -> None:
    assert float((found - exact).abs().max()) <= 3e-6 * max(5.0, float(exact.abs().max()))


@inside
@pytest.mark.parametrize("rows", [1, 7, 40, 300])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_those_of_rounded_rows(rows: int, outputs: int, inputs: int) -> None:
    assert cpp_library.unavailable() is None and cpp_library.rounds_states()
    weight, x = narrow(outputs, inputs), torch.randn(rows, inputs)
    x[0, :3] = torch.tensor([1.00390625, 1.01171875, -0.0])  # ties: to 1 and to 1.015625
    packed = pack_weight(weight)
    found = packed_linear(x, packed, outputs)
    check(found, x.bfloat16().double() @ weight.double().T)
    assert torch.equal(found[-1], packed_linear(x[-1:], packed, outputs)[0])


@inside
def test_weights_in_float32_are_multiplied_in_float32() -> None:
    weight, x = torch.randn(40, 96), torch.randn(5, 96)
    check(packed_linear(x, pack_weight(weight), 40), x.double() @ weight.double().T)


@inside
@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(broken: float) -> None:
    x = torch.ones(2, 48)
    x[1, 40] = broken
    found = packed_linear(x, pack_weight(torch.ones(32, 48).bfloat16()), 32)
    assert (found[0] == 48).all()
    assert torch.equal(found[1].nan_to_num(7, 8, 9), torch.full((32,), broken).nan_to_num(7, 8, 9))


@inside
@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("dim", [96, 102])
def test_the_head_samples_and_scores_with_the_same_rounding(rows: int, dim: int) -> None:
    if cpp_library.instructions() == "generic":
        pytest.skip("the head widens weights in memory")
    weight, hidden = narrow(1001, dim), torch.randn(rows, dim)
    drawn = linear_sample(hidden, weight, seeds=torch.arange(rows))
    logp = (hidden.bfloat16().double() @ weight.double().T).log_softmax(-1)
    check(drawn.logprob, logp.gather(1, drawn.token[:, None])[:, 0])

    def scored(states: Tensor) -> Tensor:
        return linear_logprob(states, weight, drawn.token).logprob

    assert (drawn.logprob - scored(hidden)).abs().max() < 2e-5
    assert (drawn.logprob - scored(hidden.bfloat16().float())).abs().max() < 2e-5
