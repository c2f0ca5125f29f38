"""Attention merged from variable-length calls: output and gradients in float64 equal those of one dense attention."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from alignpro_kernels.merged_attention import ALL, Part, merged_attention
from alignpro_kernels.varlen import ScoreOptions, Varlen
from alignpro_kernels.varlen_reference import ReferenceKernels

KERNELS = ReferenceKernels()


def varlen(queries: list[int], keys: list[int], causal: bool = False) -> Varlen:
    bounds = [torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in (queries, keys)]
    return Varlen(*bounds, max(queries), max(keys), causal)


OWN = [3, 4, 2, 5, 2, 1]
"""A prefix, two prompts with two and no continuations, a third with one."""
PARTS = {
    "each sequence in itself": [Part(ALL, ALL, varlen(OWN, OWN, causal=True))],
    "continuations and their prompts": [
        Part(ALL, ALL, varlen(OWN, OWN, causal=True)),
        Part(torch.tensor([*range(7, 14), 16]), torch.tensor([*range(3, 7), 14, 15]), varlen([7, 1], [4, 2])),
    ],
    "and a shared prefix": [
        Part(ALL, ALL, varlen(OWN, OWN, causal=True)),
        Part(torch.tensor([*range(7, 14), 16]), torch.tensor([*range(3, 7), 14, 15]), varlen([7, 1], [4, 2])),
        Part(slice(3, None), slice(3), varlen([14], [3])),
    ],
}


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    T, D = sum(OWN), 8
    return [torch.randn(n, T, D, dtype=dtype).transpose(0, 1).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def mask(parts: list[Part], window: int | None) -> Tensor:
    """Which query sees which key, (T, T) bool."""
    T = sum(OWN)
    seen = torch.zeros(T, T, dtype=torch.bool)
    for part in parts:
        rows, cols = torch.arange(T)[part.queries], torch.arange(T)[part.keys]
        bounds, ends = part.varlen.cu_queries.tolist(), part.varlen.cu_keys.tolist()
        for s in range(len(bounds) - 1):
            at, of = rows[bounds[s] : bounds[s + 1]], cols[ends[s] : ends[s + 1]]
            allowed = torch.ones(len(at), len(of), dtype=torch.bool)
            if part.varlen.causal:
                distance = at[:, None] - of
                allowed = (distance >= 0) & (distance < (window or T))
            seen[at[:, None], of] |= allowed
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    z = scale * torch.einsum("nhd,mhd->hnm", q, k)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.einsum("hnm,mhd->nhd", z.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "softcap", "window"),
    [(4, 4, None, None), (4, 2, None, None), (2, 1, 2.0, None), (4, 2, 1.5, 2)],
)
def test_output_and_gradients(name: str, heads: int, kv_heads: int, softcap: float | None, window: int | None) -> None:
    parts, leaves = PARTS[name], inputs(heads, kv_heads)
    ours = merged_attention(*leaves, parts, KERNELS, ScoreOptions(0.7, softcap, window))
    exact = dense(*leaves, mask(parts, window), 0.7, softcap)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(exact)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(exact, leaves, weight), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_the_gradient_needs_the_merged_output_and_log_sum_exp() -> None:
    """With each part's own ones, as in separate calls whose log-sum-exp has no gradient, it is another."""

    class Separate(ReferenceKernels):
        def backward(self, gradient, query, key, value, out, lse, varlen, options):  # type: ignore[no-untyped-def]
            out, lse = self.forward(query, key, value, varlen, options)
            return super().backward(gradient, query, key, value, out, lse, varlen, options)

    leaves, parts = inputs(4, 2), PARTS["continuations and their prompts"]
    right, wrong = (merged_attention(*leaves, parts, kernels, ScoreOptions(0.7)) for kernels in (KERNELS, Separate()))
    assert torch.equal(right, wrong)
    weight = torch.randn_like(right)
    for got, other in zip(
        torch.autograd.grad(right, leaves, weight), torch.autograd.grad(wrong, leaves, weight), strict=True
    ):
        assert not torch.allclose(got, other, rtol=0.1)


def test_gradients_agree_with_finite_differences() -> None:
    leaves, parts = inputs(2, 1), PARTS["and a shared prefix"]
    assert torch.autograd.gradcheck(
        lambda q, k, v: merged_attention(q, k, v, parts, KERNELS, ScoreOptions(0.7, softcap=3.0)),
        leaves,
        fast_mode=True,
    )


def test_bfloat16_is_merged_in_float32() -> None:
    """Its error against float64 is at most 1.5 times that of dense attention in bfloat16."""
    parts = PARTS["and a shared prefix"]
    seen = mask(parts, None)
    leaves = inputs(4, 2, torch.bfloat16)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    ours = merged_attention(*leaves, parts, KERNELS, ScoreOptions(0.7))
    plain, exact = dense(*leaves, seen, 0.7, None), dense(*exact_leaves, seen, 0.7, None)
    weight = torch.randn_like(plain)
    results = [
        (out, *torch.autograd.grad(out, at, weight.to(out.dtype)))
        for out, at in ((ours, leaves), (plain, leaves), (exact, exact_leaves))
    ]
    assert ours.dtype == torch.bfloat16
    for got, other, truth in zip(*results, strict=True):
        assert (got - truth).norm() <= 1.5 * (other - truth).norm() + 1e-6


def test_keys_may_be_more_than_queries_and_frozen() -> None:
    """As where prompts were computed before, without gradients."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    parts = [
        Part(ALL, slice(2, None), varlen([1, 2], [1, 2], causal=True)),
        Part(ALL, slice(2), varlen([3], [2])),
    ]
    q.requires_grad_()
    out = merged_attention(q, k, v, parts, KERNELS, ScoreOptions(0.5))
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]).bool()
    exact = dense(q, k, v, seen, 0.5, None)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), q), torch.autograd.grad(exact.sum(), q), atol=1e-6, rtol=1e-5
    )


def test_no_rows() -> None:
    leaves = [torch.zeros(0, 2, 4).requires_grad_() for _ in range(3)]
    none = torch.zeros(1, dtype=torch.int32)
    out = merged_attention(*leaves, [Part(ALL, ALL, Varlen(none, none, 0, 0, True))], KERNELS, ScoreOptions(1.0))
    assert [x.shape for x in torch.autograd.grad(out.sum(), leaves)] == [(0, 2, 4)] * 3


def test_the_first_part_must_have_all_queries() -> None:
    q, k, v = inputs(2, 2)
    parts = PARTS["continuations and their prompts"]
    for wrong in ([], parts[1:], [Part(slice(1, None), ALL, parts[0].varlen)]):
        with pytest.raises(ValueError, match="the first one must have all queries"):
            merged_attention(q, k, v, wrong, KERNELS, ScoreOptions(1.0))
