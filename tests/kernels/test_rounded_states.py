"""States in bfloat16 for products with weights in bfloat16: rounded, or split into sums of two (ALIGNPRO_CPU_BFLOAT16).

The choice is made once per process, so the tests run in processes of their own, here with AMX or the instructions of AVX512_BF16
where the processor has them and with the same sums in float32 elsewhere.
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
from alignpro_kernels.linear import pack_weight, packed_gate, packed_linear

PARTS = {"rounded": 1, "split": 2}.get(os.environ.get("ALIGNPRO_CPU_BFLOAT16", ""), 0)
inside = pytest.mark.skipif(PARTS == 0, reason="runs in processes of its own, below")
SHAPES = [(33, 24), (96, 160), (70, 578)]


@pytest.mark.skipif(PARTS > 0, reason="starts the others")
@pytest.mark.parametrize("instructions", ["largest", pytest.param("generic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("states", ["rounded", "split"])
def test_in_a_process_with_states_in_bfloat16(states: str, instructions: str) -> None:
    need("cpp")
    environment = os.environ | {"ALIGNPRO_CPU_BFLOAT16": states, "OMP_NUM_THREADS": "1"}
    if instructions != "largest":
        environment["ATEN_CPU_CAPABILITY"] = PYTORCH_NAMES[instructions]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.split()[0].count(".") > 10  # they were not skipped


CHOICE = """
from alignpro_kernels import cpp_library
assert cpp_library.unavailable() is None
print(cpp_library.instructions(), cpp_library.state_parts())
"""


@pytest.mark.parametrize("choice", ["", "widened"])
def test_without_a_choice_states_are_split_where_amx_multiplies(choice: str) -> None:
    need("cpp")
    environment = os.environ | {"ALIGNPRO_CPU_BFLOAT16": choice}
    done = subprocess.run([sys.executable, "-c", CHOICE], env=environment, capture_output=True, text=True, check=True)
    instructions, parts = done.stdout.split()
    assert parts == ("2" if instructions == "amx" else "0")
    assert choice == "" or instructions != "amx"


def test_an_unknown_choice_is_an_error() -> None:
    environment = os.environ | {"ALIGNPRO_CPU_BFLOAT16": "round"}
    command = [sys.executable, "-c", "from alignpro_kernels import cpp_library; cpp_library.unavailable()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "ALIGNPRO_CPU_BFLOAT16 is 'round': expected widened, rounded or split" in done.stderr


def narrow(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def in_parts(x: Tensor) -> Tensor:
    """What states become before products, in float64."""
    first = x.bfloat16()
    return first.double() + ((x - first.float()).bfloat16().double() if PARTS == 2 else 0)


def check(found: Tensor, exact: Tensor) -> None:
    assert float((found - exact).abs().max()) <= 3e-6 * max(5.0, float(exact.abs().max()))


@inside
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40, 300])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_those_of_the_parts(rows: int, outputs: int, inputs: int) -> None:
    assert cpp_library.unavailable() is None and cpp_library.state_parts() == PARTS
    weight, x = narrow(outputs, inputs), torch.randn(rows, inputs)
    x[0, :3] = torch.tensor([1.00390625, 1.01171875, -0.0])  # ties: to 1 and to 1.015625
    packed = pack_weight(weight)
    found = packed_linear(x, packed, outputs)
    check(found, in_parts(x) @ weight.double().T)
    assert torch.equal(found[-1], packed_linear(x[-1:], packed, outputs)[0])
    gated = packed_gate(x, packed, packed, outputs).double()
    expected = found.double().sigmoid() * found.double().square()
    assert torch.allclose(gated, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(PARTS < 2, reason="of split states, in a process of its own")
def test_split_states_lose_next_to_nothing() -> None:
    weight, x = narrow(96, 1536), torch.randn(40, 1536)
    exact = x.double() @ weight.double().T
    error = (packed_linear(x, pack_weight(weight), 96) - exact).norm() / exact.norm()
    rounding = (x.bfloat16().double() @ weight.double().T - exact).norm() / exact.norm()
    assert error < 4e-6 and rounding > 400 * error


@inside
def test_weights_in_float32_are_multiplied_in_float32() -> None:
    weight, x = torch.randn(40, 96), torch.randn(5, 96)
    check(packed_linear(x, pack_weight(weight), 40), x.double() @ weight.double().T)


@inside
@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(broken: float) -> None:
    x = torch.ones(2, 50)  # the last two are beyond whole vectors
    x[1, 40] = x[1, 49] = broken
    found = packed_linear(x, pack_weight(torch.ones(32, 50).bfloat16()), 32)
    assert (found[0] == 50).all()
    assert torch.equal(found[1].nan_to_num(7, 8, 9), torch.full((32,), broken).nan_to_num(7, 8, 9))


@inside
@pytest.mark.parametrize("rows", [1, 5, 32, 60, 500])
@pytest.mark.parametrize("dim", [96, 102])
def test_the_head_samples_and_scores_with_the_same_products(rows: int, dim: int) -> None:
    if cpp_library.instructions() == "generic":
        pytest.skip("the head widens weights in memory")
    weight, hidden = narrow(1001, dim), torch.randn(rows, dim)
    drawn = linear_sample(hidden, weight, seeds=torch.arange(rows))
    logp = (in_parts(hidden) @ weight.double().T).log_softmax(-1)
    check(drawn.logprob, logp.gather(1, drawn.token[:, None])[:, 0])

    def scored(states: Tensor) -> Tensor:
        return linear_logprob(states, weight, drawn.token).logprob

    assert (drawn.logprob - scored(hidden)).abs().max() < 2e-5
    if PARTS == 1:
        assert (drawn.logprob - scored(hidden.bfloat16().float())).abs().max() < 2e-5
