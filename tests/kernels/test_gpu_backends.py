"""The fast backends on a GPU, compared with the float64 reference on the CPU. `make test-gpu` runs these tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_problems import assert_as_exact_as_plain, new_problem
from head_problems import Problem, plain_pytorch, run
from torch import Tensor

from alignpro_kernels import TokenStats, linear_logprob, linear_sample, merge_states, paged_attention, policy_loss
from alignpro_kernels.head import Head, Rows

triton_head = pytest.importorskip("alignpro_kernels.triton_head")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

BACKENDS = ["triton", "torch"]
OPERATORS = ["policy_loss", "linear_logprob"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PROBLEMS = {
    "trained": Problem(),
    "frozen": Problem(trained=False),
    "shared reference": Problem(reference="shared", trained=False),
    "separate reference": Problem(reference="separate"),
    "soft-cap, bias, temperatures": Problem(bias=True, softcap=3.0, temperatures=True),
    "low rank": Problem(rank=5, trained=False),
    "masked and without coefficients": Problem(masked=True, zero_every=3),
}
SIZE = {"rows": 300, "width": 200, "vocabulary": 5001, "scale": 0.3}  # several tiles, some partial


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_are_no_larger_than_plain_pytorchs(backend: str, operator: str, dtype: torch.dtype, name: str) -> None:
    problem = replace(PROBLEMS[name], **SIZE)
    exact = run(problem, operator, "reference", torch.float64)
    ours = run(problem, operator, backend, dtype, "cuda").errors(exact)
    # The plain formula has no mask and no LoRA, so its errors are taken on the problem without them.
    like = replace(problem, masked=False, rank=0)
    plain = plain_pytorch(like, dtype, "cuda").errors(run(like, operator, "reference", torch.float64))
    for quantity, error in ours.items():
        allowed = plain.get(quantity, max(plain.values()))
        assert error <= 1.5 * allowed + 1e-6, (quantity, error, allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype) -> None:
    problem = Problem(reference="separate", bias=True, zero_every=4, **SIZE)
    for operator in OPERATORS:
        first, second = (run(problem, operator, "triton", dtype, "cuda") for _ in range(2))
        for name, value in first.values.items():
            assert torch.equal(value, second.values[name]), name


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_samples_equal_the_references(temperature: float, rows: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 128, generator=g), torch.randn(5001, 128, generator=g) / 4
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
    theirs = linear_sample(hidden.double(), weight.double(), seeds=seeds, temperature=temperature, backend="reference")
    ours = linear_sample(hidden.cuda(), weight.cuda(), seeds=seeds.cuda(), temperature=temperature, backend="triton")
    assert (ours.token.cpu() == theirs.token).float().mean() > 0.99  # ties up to rounding may differ
    same = ours.token.cpu() == theirs.token
    torch.testing.assert_close(ours.logprob.cpu().double()[same], theirs.logprob[same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.entropy.cpu().double(), theirs.entropy, rtol=1e-4, atol=1e-4)


def test_rows_times_vocabulary_beyond_31_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are one chunk, whose stored logits no 32-bit index reaches; with the usual chunks none is that large."""
    rows, width, vocabulary = 16_384, 64, 151_936  # 2.5e9 logits
    g = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, generator=g, device="cuda", dtype=torch.bfloat16) / 4).requires_grad_()
    target = torch.randint(vocabulary, (rows,), generator=g, device="cuda")
    target[-1] = vocabulary - 1

    def both() -> tuple[TokenStats, tuple[Tensor, ...]]:
        stats = linear_logprob(hidden, weight, target, entropy=True, backend="triton")
        assert stats.entropy is not None
        return stats, torch.autograd.grad((stats.logprob + stats.entropy).sum(), (hidden, weight))

    _, in_chunks = both()
    computed: list[int] = []
    forward = triton_head.forward

    def noted(head: Head, given: Rows, **options: Any) -> Any:
        computed.append(len(given.hidden) * len(head.weight))
        return forward(head, given, **options)

    monkeypatch.setattr(triton_head, "max_chunk_rows", lambda head, dtype: rows)
    monkeypatch.setattr(triton_head, "forward", noted)
    stats, (d_hidden, d_weight) = both()
    assert computed == [rows * vocabulary] * 2 and computed[0] > 2**31  # in the forward and in the backward pass

    ends = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")
    few = hidden.detach()[ends].double().requires_grad_()
    exact = linear_logprob(few, weight.detach().double(), target[ends], entropy=True, backend="reference")
    assert stats.entropy is not None and exact.entropy is not None
    torch.testing.assert_close(stats.logprob[ends].double(), exact.logprob, rtol=0, atol=1e-3)
    torch.testing.assert_close(stats.entropy[ends].double(), exact.entropy, rtol=0, atol=1e-3)
    (d_few,) = torch.autograd.grad((exact.logprob + exact.entropy).sum(), few)
    torch.testing.assert_close(d_hidden[ends].double(), d_few, rtol=0.02, atol=0.02 * float(d_few.abs().max()))
    for one, several in zip((d_hidden, d_weight), in_chunks, strict=True):
        assert float((one.float() - several.float()).norm() / several.float().norm()) < 0.01


def test_pages_beyond_31_bits() -> None:
    """The keys lie in the last pages of an arena that no 32-bit index of elements reaches, as in a pool of a large model."""
    torch.manual_seed(0)
    problem = new_problem([1, 5], [300, 70], heads=8, dim=128, dtype=torch.bfloat16)
    first = 2**31 // problem.pages[0].numel() + 1
    pages = torch.empty(first + len(problem.pages), *problem.pages.shape[1:], dtype=torch.bfloat16, device="cuda")
    pages[first:] = problem.pages.cuda()
    query, _, keys = problem.arguments("cuda")
    keys = replace(keys, page_table=keys.page_table + first)
    out, lse = paged_attention(query, pages, keys, scale=problem.scale, backend="triton")
    assert_as_exact_as_plain(problem, out.cpu(), lse.cpu())


def test_memory_beside_the_gradients() -> None:
    rows, width, vocabulary = 16_384, 896, 151_936
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) / 30).requires_grad_()
    ref = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    frozen = weight.detach().clone()
    target = torch.randint(vocabulary, (rows,), device="cuda")

    def loss():
        def coefficients(logprob, entropy, kl, positions):
            one = torch.ones_like(logprob)
            return kl - logprob, -one, None, one

        return policy_loss(
            hidden, weight, target, coefficients, ref_hidden=ref, ref_weight=frozen, backend="triton"
        ).loss

    loss().backward()  # compiles and tunes
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss().backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (hidden.numel() + weight.numel()) + 4 * weight.numel()  # and the accumulator they are rounded from
    assert peak - gradients <= 1.5 * 2**30


def test_the_hot_path_never_waits_for_the_device() -> None:
    hidden, weight = torch.randn(64, 128, device="cuda"), torch.randn(3000, 128, device="cuda")
    target, seeds = torch.randint(3000, (64,), device="cuda"), torch.arange(64, device="cuda")
    linear_logprob(hidden, weight, target, entropy=True)  # compiles and tunes
    linear_sample(hidden, weight, seeds=seeds)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(hidden, weight, target, entropy=True)
        linear_sample(hidden, weight, seeds=seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_are_merged(dtype: torch.dtype) -> None:
    outs, lses = torch.randn(3, 40, 5, 96), torch.randn(3, 40, 5) * 10
    lses[1, 3] = -torch.inf
    expected = merge_states(outs.to(dtype), lses)
    torch.testing.assert_close(merge_states(outs.to("cuda", dtype), lses.cuda()).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("counts", [[1, 1, 1], [300, 0, 1]], ids=["decode", "mixed"])
def test_paged_attention(
    counts: list[int], dim: int, softcap: float | None, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    problem = new_problem(counts, [1300, 70, 0], heads=6, dim=dim, dtype=dtype, softcap=softcap, window=window)
    arguments = problem.arguments("cuda")
    torch.cuda.synchronize()
    options = {"scale": problem.scale, "softcap": softcap, "window": window, "backend": "triton"}
    out, lse = paged_attention(*arguments, **options)
    assert_as_exact_as_plain(problem, out.cpu(), lse.cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, _ = paged_attention(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, out)
