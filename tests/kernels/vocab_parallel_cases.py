"""Named calls that two ranks make together, each with its slice of a head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from head_problems import Problem
from torch import Tensor

BACKENDS = ["reference", "torch", "cpp", "triton"]
OPERATORS = ["policy_loss", "linear_logprob"]

SMALL = Problem(rows=11, width=12, vocabulary=157)
PROBLEMS = {
    "plain": SMALL,
    "everything": replace(
        SMALL, bias=True, rank=3, reference="separate", softcap=3.0, temperatures=True, masked=True, zero_every=3
    ),
    "shared reference": replace(SMALL, reference="shared", bias=True),
    "frozen head": replace(SMALL, reference="shared", trained=False),
    "no coefficient": replace(SMALL, zero_every=1),
    "nothing left": replace(SMALL, rows=0),
}
SIZES = {"even": (79, 78), "uneven": (150, 7), "one row": (1, 156)}
EXACT = {"reference": torch.float64, "torch": torch.float64, "cpp": torch.float32, "triton": torch.float32}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    """A call of an operator; ``most_rows`` bounds the chunks of each rank."""

    problem: Problem
    operator: str
    backend: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    most_rows: tuple[int, int] | None = None


def _cases() -> dict[str, Case]:
    cases = {}
    for backend in BACKENDS:
        dtype = EXACT[backend]
        for operator in OPERATORS:
            for name, problem in PROBLEMS.items():
                cases[f"{backend} {operator} {name}"] = Case(problem, operator, backend, dtype, SIZES["even"])
            for name in ("uneven", "one row"):
                everything = PROBLEMS["everything"]
                cases[f"{backend} {operator} {name}"] = Case(everything, operator, backend, dtype, SIZES[name])
            if backend != "reference":
                cases[f"{backend} {operator} chunks"] = Case(
                    PROBLEMS["everything"], operator, backend, dtype, SIZES["even"], (4, 3)
                )
    # A call takes a large part of a second in the interpreter.
    left_out = [f"triton linear_logprob {name}" for name in ("shared reference", "frozen head", "one row", "chunks")]
    return {name: case for name, case in cases.items() if name not in left_out}


CASES = _cases()

# The errors of these are compared with those of plain PyTorch in the same dtype.
ROUNDED = {
    f"{backend} {operator} bfloat16": Case(
        Problem(rows=24, width=48, vocabulary=400, reference="shared", scale=0.6, zero_every=5),
        operator,
        backend,
        torch.bfloat16,
        (230, 170),
    )
    for backend in ("torch", "cpp", "triton")
    for operator in OPERATORS
    if (backend, operator) != ("triton", "linear_logprob")  # takes seconds in the interpreter
}

ADVERSARIAL_SIZES = (130, 170)
ADVERSARIAL = {
    "near -1e4": {"bias": -1e4},
    "offset +1e4": {"bias": 1e4},
    "peaked": {"hidden": 300.0},
    "flat": {"hidden": 0.0},
    "a slice ruled out": {"ruled out": slice(130, 300)},
    "another slice ruled out": {"ruled out": slice(0, 130)},
}


def adversarial(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return arguments of five rows, with targets on both sides of the slices' boundary."""
    g = torch.Generator().manual_seed(0)
    change = ADVERSARIAL[name]
    vocabulary = sum(ADVERSARIAL_SIZES)
    hidden = torch.randn(5, 33, generator=g) * change.get("hidden", 1.0)
    hidden[3:] = hidden[2]  # duplicates
    weight = torch.randn(vocabulary, 33, generator=g)
    bias = torch.full((vocabulary,), change.get("bias", 0.0))
    target = torch.tensor([0, 299, 129, 130, 130])
    if "ruled out" in change:
        out = change["ruled out"]
        bias[out] = -torch.inf
        target = torch.tensor([0, 129, 5, 6, 6]) + (130 if out.start == 0 else 0)
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "target": target,
        "bias": bias.to(dtype),
        "ref_hidden": torch.randn(5, 33, generator=g).to(dtype),
        "ref_weight": weight.to(dtype),
        "entropy": True,
    }


def sampling(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return arguments of `linear_sample`: 40 rows, some greedy."""
    g = torch.Generator().manual_seed(3)
    arguments = {
        "hidden": torch.randn(40, 16, generator=g).to(dtype),
        "weight": torch.randn(300, 16, generator=g).to(dtype) * 0.3,
        "seeds": torch.randint(-(2**63), 2**63 - 1, (40,), generator=g),
        "temperature": torch.rand(40, generator=g).to(dtype) + 0.5,
    }
    arguments["temperature"][::4] = 0.0
    bias = torch.randn(300, generator=g)
    if name == "everything":
        lora = torch.randn(2, 16, generator=g), torch.randn(300, 2, generator=g)
        arguments |= {"bias": bias.to(dtype), "softcap": 4.0, "lora": tuple(x.to(dtype) for x in lora)}
    elif name == "a slice ruled out":
        bias[:130] = -torch.inf
        arguments["bias"] = bias.to(dtype)
    return arguments


SAMPLING = ["plain", "everything", "a slice ruled out"]
