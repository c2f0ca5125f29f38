"""Gradients of the Triton backend, interpreted, compared with float64."""

from dataclasses import replace

import pytest
import torch
from cases import HALF_AND_SINGLE, Case, assert_as_good, empty_gradients, make_case, oracle, plain, with_rows
from torch import Tensor

from alignpro_kernels import triton_head
from alignpro_kernels.head import HeadGradients, Upstream

HEADS = [
    {},
    {"bias": True, "temperature": "rows", "ref": "shared"},
    {"softcap": 5.0, "temperature": 0.7, "ref": "separate"},
    {"rank": 4, "ref": "shared"},
    {"rank": 20, "bias": True, "softcap": 3.0, "temperature": "rows", "ref": "separate"},
]


def run(case: Case, gradients: HeadGradients, active: Tensor | None = None) -> HeadGradients:
    stats, saved = triton_head.forward(case.head, case.rows, entropy=case.entropy, save_logits=True)
    assert saved is not None
    triton_head.backward(case.head, case.rows, saved, stats, Upstream(active, *case.coefficients), gradients)
    return gradients


def check(case: Case, active: Tensor | None = None, *, frozen: bool = False, accumulate: bool = False) -> HeadGradients:
    gradients = run(case, empty_gradients(case, frozen=frozen, accumulate=accumulate), active)
    exact, usual = oracle(case)[1], plain(case)[1]
    for name, expected in exact.items():
        got = getattr(gradients, name)
        if got is None:
            continue
        if accumulate and name in ("weight", "bias", "lora_b"):
            got = got - 1.0
        assert_as_good(got, expected, usual[name], name)
    return gradients


def silenced(case: Case, active: Tensor) -> Case:
    """Set the coefficients to zero except in the active rows."""
    keep = torch.zeros(len(case.rows.hidden)).index_fill_(0, active, 1.0)
    return replace(case, coefficients=tuple(None if x is None else x * keep for x in case.coefficients))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("kind", range(len(HEADS)))
def test_gradients(dtype: torch.dtype, kind: int) -> None:
    check(make_case(dtype, scale=2.0, **HEADS[kind]))


@pytest.mark.parametrize(
    ("coefficients", "ref"),
    [
        ("alpha", "shared"),
        ("eta", "separate"),
        ("kappa", "shared"),
        ("kappa", "separate"),
        ("alpha kappa", "separate"),
        ("eta kappa", "shared"),
    ],
)
def test_each_coefficient(coefficients: str, ref: str) -> None:
    check(make_case(torch.bfloat16, ref=ref, coefficients=coefficients, bias=True, scale=2.0))


@pytest.mark.parametrize(
    "active", [[4], [0, 1, 2], [12], [0, 3, 4, 9, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
)
@pytest.mark.parametrize("kind", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_active_rows(active: list[int], kind: int) -> None:
    index = torch.tensor(active)
    case = silenced(make_case(torch.float32, **HEADS[kind]), index)
    gradients = check(case, index)
    quiet = torch.ones(len(case.rows.hidden), dtype=torch.bool).index_fill_(0, index, False)
    assert gradients.hidden is not None
    assert (gradients.hidden[quiet] == 0).all()


def test_active_rows_past_a_block_of_rows() -> None:
    """There are more rows than one program handles at a time: rows that were moved are not read again."""
    index = torch.arange(50)[torch.arange(50) % 7 != 3]
    check(silenced(make_case(torch.float32, count=50, ref="shared", bias=True), index), index)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_gradients_are_accumulated(dtype: torch.dtype) -> None:
    check(make_case(dtype, bias=True, rank=4), accumulate=True)


def test_frozen_head() -> None:
    case = make_case(torch.bfloat16, bias=True, rank=4)
    check(case, frozen=True)
    nothing = HeadGradients(None, None, None, torch.full((len(case.head.weight),), torch.nan), None, False)
    run(case, nothing)
    assert_as_good(nothing.bias, oracle(case)[1]["bias"], plain(case)[1]["bias"], "bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_offset(dtype: torch.dtype, offset: float) -> None:
    case = make_case(dtype, ref="shared", bias=True)
    bias = torch.full_like(case.head.bias, offset)
    check(replace(case, head=case.head._replace(bias=bias, ref_bias=bias)))


def test_shapes() -> None:
    for count, width, vocabulary in ((1, 32, 64), (17, 33, 65), (2, 1, 2)):
        check(make_case(torch.float32, count=count, width=width, vocabulary=vocabulary, ref="shared", bias=True))


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_float16_neither_underflows_nor_overflows(size: float) -> None:
    """The loss is averaged over many tokens: α p is below float16's range."""
    case = make_case(torch.float16, ref="shared", scale=0.1, vocabulary=300)
    case = replace(case, coefficients=tuple(x * size for x in case.coefficients))
    gradients, exact = run(case, empty_gradients(case)), oracle(case)[1]
    assert (gradients.weight - exact["weight"]).norm() < 2e-3 * exact["weight"].norm()
    # The gradient of the hidden states is itself float16, with steps of 6e-8.
    rounding = exact["hidden"].half().double() - exact["hidden"]
    assert (gradients.hidden - exact["hidden"]).norm() < 1.5 * rounding.norm() + 2e-3 * exact["hidden"].norm()


def test_forbidden_tokens_get_no_gradient() -> None:
    case = make_case(torch.float32, bias=True, vocabulary=160, ref="shared", count=6)
    bias = case.head.bias.clone()
    bias[:64] = -torch.inf
    case = with_rows(
        replace(case, head=case.head._replace(bias=bias, ref_bias=bias)), target=case.rows.target.clamp_min(64)
    )
    gradients = run(case, empty_gradients(case))
    assert gradients.weight.isfinite().all() and gradients.hidden.isfinite().all()
    assert (gradients.weight[:64] == 0).all() and (gradients.bias[:64] == 0).all()


def test_nan_in_inactive_rows_has_no_effect() -> None:
    case = make_case(torch.float32, bias=True)
    hidden = case.rows.hidden.clone()
    hidden[5] = torch.nan
    case = silenced(with_rows(case, hidden=hidden), index := torch.tensor([0, 2, 11]))
    gradients = run(case, empty_gradients(case), index)
    for got in (gradients.hidden, gradients.weight, gradients.bias):
        assert got.isfinite().all()


def test_nan_in_an_active_row_propagates() -> None:
    case = make_case(torch.float32, bias=True)
    hidden = case.rows.hidden.clone()
    hidden[5] = torch.nan
    gradients = run(with_rows(case, hidden=hidden), empty_gradients(case))
    assert gradients.hidden[5].isnan().all() and gradients.bias.isnan().all()
    assert gradients.hidden[:5].isfinite().all() and gradients.hidden[6:].isfinite().all()


def test_two_calls_give_the_same_bits() -> None:
    case = make_case(torch.bfloat16, bias=True, rank=4, ref="shared")
    first, second = (run(case, empty_gradients(case)) for _ in range(2))
    for name in ("hidden", "lora_hidden", "weight", "bias", "lora_b"):
        assert torch.equal(getattr(first, name), getattr(second, name))
