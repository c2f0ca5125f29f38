"""Statistics of the Triton backend, interpreted, compared with float64."""

from dataclasses import replace

import pytest
import torch
from cases import HALF_AND_SINGLE, Case, assert_as_good, make_case, oracle, plain, with_rows

from alignpro_kernels import triton_head

NAMES = ("logprob", "entropy", "kl")
HEADS = [
    {},
    {"bias": True, "temperature": "rows"},
    {"softcap": 2.0, "temperature": 0.7},
    {"rank": 4},
    {"rank": 40, "bias": True, "softcap": 3.0, "temperature": "rows"},
]


def check(case: Case) -> None:
    stats, saved = triton_head.forward(case.head, case.rows, entropy=case.entropy, save_logits=False)
    assert saved is None
    for name, got, exact, usual in zip(NAMES, stats[:3], oracle(case)[0], plain(case)[0], strict=True):
        assert_as_good(got, exact, usual, name)


SINGLE, *HALF = HALF_AND_SINGLE
REFERENCES = (None, "shared", "separate")
CASES = [(SINGLE, ref, kind) for ref in REFERENCES for kind in range(len(HEADS))]
CASES += [(dtype, REFERENCES[(kind + i) % 3], kind) for i, dtype in enumerate(HALF) for kind in range(len(HEADS))]
"""All in float32; in 16 bits each kind of head with one kind of reference, and both dtypes with all three."""


@pytest.mark.parametrize(("dtype", "ref", "kind"), CASES, ids=str)
def test_statistics(dtype: torch.dtype, ref: str | None, kind: int) -> None:
    check(make_case(dtype, ref=ref, scale=3.0, **HEADS[kind]))


@pytest.mark.parametrize("ref", [None, "shared"])
def test_without_entropy(ref: str | None) -> None:
    check(make_case(torch.bfloat16, ref=ref, entropy=False, coefficients="alpha kappa"))


@pytest.mark.parametrize(
    ("count", "width", "vocabulary"), [(1, 32, 64), (17, 33, 65), (2, 1, 2), (16, 7, 1), (33, 64, 97)]
)
def test_shapes(count: int, width: int, vocabulary: int) -> None:
    check(make_case(torch.float32, count=count, width=width, vocabulary=vocabulary, ref="shared"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peaked_and_flat_rows(dtype: torch.dtype) -> None:
    case = make_case(dtype, ref="shared", scale=1.0)
    hidden = case.rows.hidden.clone()
    hidden[0] = 0  # flat
    hidden[1] *= 60  # all probability on one token
    hidden[2] = hidden[3]  # two rows alike
    target = case.rows.target.clone()
    target[1] = (hidden[1].float() @ case.head.weight.float().T).argmax()
    target[2:4] = len(case.head.weight) - 1  # in the last, partial tile
    check(with_rows(case, hidden=hidden, target=target))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_common_offset_changes_nothing(offset: float) -> None:
    case = make_case(torch.float32, ref="shared", scale=3.0)
    bias = torch.full((len(case.head.weight),), offset)
    check(replace(case, head=case.head._replace(bias=bias, ref_bias=bias)))


def test_equal_policies_have_no_kl() -> None:
    case = make_case(torch.bfloat16, ref="shared", scale=4.0)
    case = with_rows(case, ref_hidden=case.rows.hidden)
    stats, _ = triton_head.forward(case.head, case.rows, entropy=False, save_logits=False)
    assert torch.equal(stats.kl, torch.zeros_like(stats.kl))


def test_nan_stays_in_its_row() -> None:
    case = make_case(torch.float32, ref="shared", count=5)
    hidden, ref_hidden = case.rows.hidden.clone(), case.rows.ref_hidden.clone()
    hidden[1, 3] = torch.nan
    ref_hidden[3, 0] = torch.nan
    clean, _ = triton_head.forward(case.head, case.rows, entropy=True, save_logits=False)
    case = with_rows(case, hidden=hidden, ref_hidden=ref_hidden)
    stats, _ = triton_head.forward(case.head, case.rows, entropy=True, save_logits=False)
    assert stats.logprob.isnan().tolist() == [False, True, False, False, False]
    assert stats.entropy.isnan().tolist() == [False, True, False, False, False]
    assert stats.kl.isnan().tolist() == [False, True, False, True, False]
    for got, before in zip(stats[:3], clean[:3], strict=True):
        assert torch.equal(got[[0, 2, 4]], before[[0, 2, 4]])


def test_a_nan_logit_propagates_even_if_others_of_its_tile_are_larger() -> None:
    case = make_case(torch.float32, bias=True, count=3)
    bias = case.head.bias.clone()
    bias[70] = torch.nan
    head = type(case.head)(case.head.weight, bias)
    stats, _ = triton_head.forward(head, case.rows, entropy=True, save_logits=False)
    assert stats.logprob.isnan().all() and stats.entropy.isnan().all()


def test_forbidden_tokens_have_no_effect() -> None:
    """With a bias of −∞ over whole tiles, the result is that of the remaining vocabulary."""
    case = make_case(torch.float32, bias=True, count=4, vocabulary=160)
    bias = case.head.bias.clone()
    bias[:64] = -torch.inf
    bias[100] = -torch.inf
    keep = bias.isfinite().nonzero().squeeze(1)
    target = torch.tensor([64, 159, 99, 101])
    stats, _ = triton_head.forward(
        type(case.head)(case.head.weight, bias), with_rows(case, target=target).rows, entropy=True, save_logits=False
    )
    head = type(case.head)(case.head.weight[keep].contiguous(), bias[keep])
    position = torch.searchsorted(keep, target)
    less = oracle(with_rows(replace(case, head=head), target=position))[0]
    torch.testing.assert_close(stats.logprob.double(), less[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(stats.entropy.double(), less[1], rtol=0, atol=2e-6)


def test_two_calls_give_the_same_bits() -> None:
    case = make_case(torch.bfloat16, ref="separate", rank=4, bias=True)
    first, saved = triton_head.forward(case.head, case.rows, entropy=True, save_logits=True)
    second, again = triton_head.forward(case.head, case.rows, entropy=True, save_logits=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    vocabulary = len(case.head.weight)
    assert torch.equal(saved.logits[:, :vocabulary], again.logits[:, :vocabulary])


def test_one_token_of_a_row_has_all_probability() -> None:
    case = make_case(torch.float32, count=2, scale=1.0)
    case = with_rows(case, hidden=case.rows.hidden * 1e4)
    z = case.rows.hidden @ case.head.weight.T
    stats, _ = triton_head.forward(case.head, with_rows(case, target=z.argmax(1)).rows, entropy=True, save_logits=False)
    assert stats.logprob.abs().max() == 0 and stats.entropy.abs().max() == 0
