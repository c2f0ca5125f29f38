"""Gradients of the fast backends: the products that they compute, autograd, torch.compile and tied weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fast_backends import FAST, OPERATORS
from head_problems import Problem, run
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from alignpro_kernels import LoRA, fused, linear_logprob, linear_sample, policy_loss
from alignpro_kernels.backends import backend_module

pytestmark = pytest.mark.usefixtures("runnable")
EVERYTHING = Problem(bias=True, rank=4, reference="separate", softcap=3.0, temperatures=True)


def weighted(weights: torch.Tensor):
    return lambda logprob, entropy, kl, rows: (weights[rows] * logprob, weights[rows], None, None)


class Spy:
    """A backend that records the calls of the chunk loop."""

    def __init__(self, name: str) -> None:
        self._backend = backend_module(name)
        self.rows: list[int] = []
        self.gradients: list[fused.HeadGradients] = []
        self.active: list[torch.Tensor | None] = []

    def max_chunk_rows(self, head, dtype) -> int:
        return 4

    def logits_buffer_rows(self, head) -> int:
        return 0

    def forward(self, head, rows, *, entropy, save_logits):
        self.rows.append(len(rows.hidden))
        return self._backend.forward(head, rows, entropy=entropy, save_logits=save_logits)

    def backward(self, head, rows, saved, stats, upstream, gradients) -> None:
        self.active.append(upstream.active)
        self.gradients.append(gradients)
        self._backend.backward(head, rows, saved, stats, upstream, gradients)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    watched = Spy("torch")
    monkeypatch.setattr("alignpro_kernels.operators.backend_module", lambda name: watched)
    return watched


def test_gradients_agree_with_finite_differences() -> None:
    a = replace(EVERYTHING, rows=5, width=4, vocabulary=9, rank=2).tensors(torch.float64)
    lora = a.pop("lora")
    variables = (a.pop("hidden"), a.pop("weight"), a.pop("bias"), lora.a, lora.b)

    def stats(hidden, weight, bias, lora_a, lora_b):
        lora = LoRA(lora_a, lora_b, 0.3)
        return linear_logprob(hidden, weight, bias=bias, lora=lora, backend="torch", **a)

    def loss(hidden, weight, bias, lora_a, lora_b):
        def callback(logprob, entropy, kl, rows):
            # The loss is not linear, so that the coefficients depend on the statistics.
            return logprob.square() + entropy * kl, 2 * logprob, kl, entropy

        lora = LoRA(lora_a, lora_b, 0.3)
        return policy_loss(hidden, weight, coefficients=callback, bias=bias, lora=lora, backend="torch", **a).loss

    assert gradcheck(stats, variables)
    assert gradcheck(loss, variables)


def test_masked_rows_reach_no_product(spy: Spy) -> None:
    hidden, weight = torch.randn(10, 8), torch.randn(50, 8, requires_grad=True)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    target = torch.where(mask, 3, -100)
    seen = []

    def record(logprob, entropy, kl, rows):
        seen.extend(rows.tolist())
        return logprob, torch.ones_like(logprob), None, None

    out = policy_loss(hidden, weight, target, record, mask=mask, backend="torch")
    out.loss.backward()
    assert sum(spy.rows) == 4 and seen == [0, 3, 4, 9]
    assert (out.logprob[~mask] == 0).all() and (hidden.grad[~mask] == 0).all()
    assert weight.grad.isfinite().all() and (hidden.grad[mask] != 0).any()
    stats = linear_logprob(hidden, weight, target, mask=mask, backend="torch")
    assert torch.equal(stats.logprob, out.logprob)
    nothing = policy_loss(hidden, weight, target, record, mask=torch.zeros_like(mask), backend="torch")
    nothing.loss.backward()
    assert nothing.loss == 0 and (nothing.logprob == 0).all()


def test_rows_without_a_coefficient_reach_no_gradient_product(spy: Spy) -> None:
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.zeros(12, dtype=torch.int64)
    weights = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    out = policy_loss(hidden, weight, target, weighted(weights), backend="torch")
    out.loss.backward()
    assert [None if x is None else x.tolist() for x in spy.active] == [[1, 3], None]  # one of three chunks is skipped
    assert (hidden.grad[weights == 0] == 0).all()
    spy.rows.clear()
    logprob = linear_logprob(hidden, weight, target, backend="torch").logprob
    spy.rows.clear()
    (weights * logprob).sum().backward()
    assert sum(spy.rows) == 6  # their logits are not recomputed either


def test_no_gradient_of_a_frozen_head_is_computed_or_allocated(spy: Spy) -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    target = torch.zeros(6, dtype=torch.int64)
    policy_loss(hidden, weight, target, weighted(torch.ones(6)), backend="torch").loss.backward()
    assert all(g.weight is None and g.bias is None and g.hidden is not None for g in spy.gradients)
    with torch.no_grad():
        spy.gradients.clear()
        out = policy_loss(hidden, weight, target, weighted(torch.ones(6)), backend="torch")
    assert not spy.gradients and not out.loss.requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_backward_scales_and_can_be_repeated_with_a_retained_graph(backend: str) -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64)

    def loss():
        return policy_loss(hidden, weight, target, weighted(torch.ones(6)), backend=backend).loss

    once = torch.autograd.grad(loss(), [hidden, weight])
    thrice = torch.autograd.grad(3 * loss(), [hidden, weight])
    out = 3 * loss()
    retained = torch.autograd.grad(out, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(out, [hidden, weight])
    for a, b, c, d in zip(once, thrice, retained, again, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(b, c) and torch.equal(c, d)


def test_the_gradient_of_a_leaf_is_the_buffer_of_the_forward_pass() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = policy_loss(hidden, weight, torch.zeros(6, dtype=torch.int64), weighted(torch.ones(6)), backend="torch").loss
    made = [x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None]
    loss.backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == made


@pytest.mark.parametrize("backend", FAST)
def test_tied_embeddings_get_both_gradients(backend: str) -> None:
    embedding = nn.Embedding(60, 12)
    ids = torch.arange(7)
    target = torch.randint(60, (7,), generator=torch.Generator().manual_seed(0))

    def loss(backend: str):
        out = policy_loss(embedding(ids), embedding.weight, target, weighted(torch.ones(7)), backend=backend)
        return torch.autograd.grad(out.loss, embedding.weight)[0]

    torch.testing.assert_close(loss(backend), loss("reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_around_the_backward_pass_changes_no_bit(operator: str, backend: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(EVERYTHING, operator, backend, torch.float32)
    outside = run(EVERYTHING, operator, backend, torch.float32)
    for name, value in inside.values.items():
        assert torch.equal(value, outside.values[name]), name


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_second_derivatives_are_refused_rather_than_left_out(backend: str) -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    lora = LoRA(torch.randn(2, 8, requires_grad=True), torch.randn(50, 2, requires_grad=True), 0.5)
    target, options = torch.zeros(6, dtype=torch.int64), {"lora": lora, "backend": backend}
    losses = [policy_loss(hidden, weight, target, weighted(torch.ones(6)), **options).loss]
    if backend != "reference":
        losses.append(linear_logprob(hidden, weight, target, **options).logprob.sum())
    for loss in losses:
        for leaf in (hidden, weight, lora.a, lora.b):
            with pytest.raises(RuntimeError, match=r"create_graph=True.* use linear_logprob with backend='reference'"):
                torch.autograd.grad(loss, leaf, create_graph=True)


def test_the_reference_has_second_derivatives() -> None:
    variables = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3), (4, 3))]
    target = torch.zeros(2, dtype=torch.int64)
    assert gradgradcheck(lambda *x: linear_logprob(*x, target, backend="reference").logprob, variables)


@pytest.mark.parametrize("backend", FAST)
def test_torchs_defaults_do_not_matter(backend: str) -> None:
    """The default dtype, and a default device on which tensors have no values."""
    arguments = Problem(rows=9, width=40).tensors(torch.float32)

    def call() -> list[torch.Tensor]:
        options = {"backend": backend, "temperature": 0.7}
        hidden, weight = arguments["hidden"], arguments["weight"]
        stats = linear_logprob(hidden, weight, arguments["target"], **options)
        loss = policy_loss(hidden, weight, arguments["target"], weighted(ones), **options).loss
        gradients = torch.autograd.grad(loss + stats.logprob.sum(), [hidden, weight])
        return [loss, *gradients, *linear_sample(hidden, weight, seeds=seeds, **options)]

    ones, seeds = torch.ones(9), torch.arange(9)
    expected = call()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = call()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_derivative_at_all_means_no_active_row_on_the_device_of_the_rows() -> None:
    assert fused._active_rows((None, None, None), torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("backend", FAST)
def test_under_torch_compile(backend: str) -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target, one = torch.zeros(6, dtype=torch.int64), torch.ones(6)

    def step(hidden, weight):
        stats = linear_logprob(hidden * 2, weight, target, entropy=True, backend=backend)
        out = policy_loss(hidden * 2, weight, target, weighted(one), backend=backend)
        return (stats.logprob + stats.entropy).sum() + out.loss

    eager = torch.autograd.grad(step(hidden, weight), [hidden, weight])
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager")(hidden, weight), [hidden, weight])
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
