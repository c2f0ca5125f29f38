"""The comparison that the tests on a GPU make runs with tensors of another device: here those that have no data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_problems import Problem, Result, plain_pytorch, run
from torch.utils._python_dispatch import TorchDispatchMode

PROBLEMS = {
    "trained": Problem(),
    "shared reference": Problem(reference="shared", trained=False),
    "separate reference": Problem(reference="separate"),
    "soft-cap, bias, temperatures": Problem(bias=True, softcap=3.0, temperatures=True),
    "low rank": Problem(rank=5, trained=False),
}


class CopiesToTheCPU(TorchDispatchMode):
    """Tensors on ``meta`` can be copied to the CPU, where they are zeros; other operators still reject mixed devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def check(result: Result, exact: Result) -> None:
    """Check that all values are on the CPU and can be compared with those of float64."""
    assert {name: value.device.type for name, value in result.values.items()} == dict.fromkeys(exact.values, "cpu")
    assert result.errors(exact).keys() == exact.values.keys()


@pytest.mark.parametrize("operator", ["policy_loss", "linear_logprob"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_results_of_another_device_compare_with_the_references(name: str, operator: str) -> None:
    problem = PROBLEMS[name]
    with CopiesToTheCPU():
        result = run(problem, operator, "reference", torch.bfloat16, "meta")
    check(result, run(problem, operator, "reference", torch.float64))


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "low rank"])
def test_plain_pytorchs_results_do_too(name: str) -> None:
    problem = PROBLEMS[name]
    with CopiesToTheCPU():
        result = plain_pytorch(problem, torch.bfloat16, "meta")
    check(result, run(problem, "linear_logprob", "reference", torch.float64))
