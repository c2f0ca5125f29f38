"""Sampling by the Triton backend, interpreted, compared with the reference."""

from dataclasses import replace

import pytest
import torch
from cases import HALF_AND_SINGLE, Case, assert_as_good, make_case, oracle, plain, with_rows
from splitmix import seed_of
from torch import Tensor

from alignpro_kernels import gumbel_noise, reference, triton_head


def seeds_of(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(1))


def exact_sample(case: Case, seeds: Tensor) -> Tensor:
    head, rows = case.head, case.rows
    hidden, weight = rows.hidden.double(), head.weight.double()
    if rows.lora_hidden is not None:
        hidden = torch.cat((hidden, rows.lora_hidden.double()), 1)
        weight = torch.cat((weight, head.lora_b.double()), 1)
    tau = rows.temperature
    return reference.linear_sample(
        hidden,
        weight,
        seeds=seeds,
        bias=None if head.bias is None else head.bias.double(),
        temperature=tau.double() if isinstance(tau, Tensor) else tau,
        softcap=head.softcap,
    ).token


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    "kind",
    [{}, {"bias": True, "temperature": "rows"}, {"softcap": 2.0, "temperature": 0.3}, {"rank": 20, "bias": True}],
    ids=str,
)
def test_samples_equal_those_of_the_reference(dtype: torch.dtype, kind: dict) -> None:
    case = make_case(dtype, count=19, coefficients="alpha", **kind)
    seeds = seeds_of(19)
    out = triton_head.sample(case.head, case.rows, seeds)
    assert torch.equal(out.token, exact_sample(case, seeds))
    drawn = with_rows(case, target=out.token)
    (logprob, entropy, _), (usual_logprob, usual_entropy, _) = oracle(drawn)[0], plain(drawn)[0]
    assert_as_good(out.logprob, logprob, usual_logprob, "logprob")
    assert_as_good(out.entropy, entropy, usual_entropy, "entropy")


def test_noise() -> None:
    seeds = seeds_of(40)
    got, exact = triton_head.gumbel_noise(seeds, 1500), gumbel_noise(seeds, 1500, torch.float64)
    assert (got - exact).abs().max() < 2e-6


def test_noise_at_the_ends() -> None:
    """Seeds whose first hash is all ones, all zeros, or close to either: u from 1e-16 to 1 − 1e-16."""
    outputs = [-1, -2, -(2**20), -(2**40), 0, 1, 2**20, 2**40, 2**63 - 1, -(2**63), 2**63 - 2**30, -(2**63) + 2**30]
    seeds = torch.tensor([seed_of(output) for output in outputs])
    got, exact = triton_head.gumbel_noise(seeds, 1), gumbel_noise(seeds, 1, torch.float64)
    assert exact.max() > 36 and exact.min() < -3.6
    assert ((got - exact).abs() < 4e-6).all()


def test_greedy_rows_take_the_lowest_id_of_equal_logits() -> None:
    case = make_case(torch.float32, count=4, vocabulary=150)
    weight = case.head.weight.clone()
    weight[[30, 31, 95, 149]] = 0.0
    weight[[30, 31, 95, 149], 0] = 100.0  # equal and best, in several tiles
    hidden = case.rows.hidden.clone()
    hidden[:, 0] = hidden[:, 0].abs() + 1
    tau = torch.tensor([0.0, 1.0, 0.0, 2.0])
    case = with_rows(replace(case, head=type(case.head)(weight)), hidden=hidden, temperature=tau)
    out = triton_head.sample(case.head, case.rows, seeds_of(4))
    assert out.token[[0, 2]].tolist() == [30, 30]
    assert (out.logprob[[0, 2]] == 0).all() and (out.entropy[[0, 2]] == 0).all()
    assert torch.equal(out.token, exact_sample(case, seeds_of(4)))
    assert (out.logprob[[1, 3]] < 0).all()


def test_temperature_zero_for_all() -> None:
    case = make_case(torch.bfloat16, temperature=0.0, bias=True)
    out = triton_head.sample(case.head, case.rows, seeds_of(13))
    z = case.rows.hidden.double() @ case.head.weight.double().T + case.head.bias.double()
    assert torch.equal(out.token, z.argmax(1))
    assert (out.logprob == 0).all() and (out.entropy == 0).all()


def test_a_token_does_not_depend_on_its_batch() -> None:
    case, seeds = make_case(torch.bfloat16, count=33), seeds_of(33)
    together = triton_head.sample(case.head, case.rows, seeds)
    for chunk in (slice(0, 1), slice(5, 22)):
        alone = triton_head.sample(case.head, case.rows.select(chunk), seeds[chunk])
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[chunk])


def test_a_nan_row_gives_a_token_of_the_vocabulary() -> None:
    case = make_case(torch.float32, count=3)
    hidden = case.rows.hidden.clone()
    hidden[1] = torch.nan
    out = triton_head.sample(case.head, with_rows(case, hidden=hidden).rows, seeds_of(3))
    assert ((out.token >= 0) & (out.token < len(case.head.weight))).all()
    assert out.logprob.isnan().tolist() == [False, True, False]


def test_forbidden_tokens_are_never_drawn() -> None:
    case = make_case(torch.float32, count=64, bias=True, vocabulary=100)
    bias = case.head.bias.clone()
    bias[:90] = -torch.inf
    out = triton_head.sample(type(case.head)(case.head.weight, bias), case.rows, seeds_of(64))
    assert (out.token >= 90).all() and out.logprob.isfinite().all()
