"""The fast backends held against the float64 reference: values, gradients, chunks, masks, bad rows, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from head_problems import Problem, plain_pytorch, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from alignpro_kernels import Coefficients, LoRA, backends, cpp_head, fused, linear_logprob, linear_sample, policy_loss
from alignpro_kernels.backends import backend_module

FAST = ["torch", "cpp"]
OPERATORS = ["policy_loss", "linear_logprob"]
EVERYTHING = Problem(bias=True, rank=4, reference="separate", softcap=3.0, temperatures=True)


@pytest.fixture(autouse=True)
def _runnable(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if backend is not None:
        need(backend)


def need(backend: str) -> None:
    """Skip where there is no compiler; a library that does not build or load is a failure, and no reason to skip."""
    if (reason := backends()[backend]) is None:
        return
    if "no C++ compiler found" in reason:
        pytest.skip(f"backend {backend}: {reason}")
    pytest.fail(f"backend {backend}: {reason}")


def agree(problem: Problem, operator: str, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    exact = run(problem, operator, "reference", torch.float64)
    errors = run(problem, operator, backend, dtype).errors(exact)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("torch", torch.float64, 1e-11), ("cpp", torch.float32, 2e-5)]
)
@pytest.mark.parametrize("reference", ["none", "shared", "separate"])
@pytest.mark.parametrize("coefficients", ["alpha", "eta", "kappa", "mixed"])
@pytest.mark.parametrize("trained", [True, False])
def test_each_coefficient_alone_and_mixed(
    operator, backend, dtype, tolerance, reference, coefficients, trained
) -> None:
    if coefficients == "kappa" and reference == "none":
        pytest.skip("κ needs a reference")
    problem = Problem(reference=reference, coefficients=coefficients, trained=trained)
    agree(problem, operator, backend, dtype, tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    problem=st.builds(
        Problem,
        rows=st.integers(1, 40),
        width=st.integers(1, 70),
        vocabulary=st.integers(2, 1500),
        trained=st.booleans(),
        bias=st.booleans(),
        rank=st.sampled_from([0, 1, 5]),
        reference=st.sampled_from(["none", "shared", "separate"]),
        softcap=st.sampled_from([None, 2.0, 30.0]),
        temperatures=st.booleans(),
        coefficients=st.sampled_from(["alpha", "eta", "mixed"]),
        zero_every=st.sampled_from([0, 1, 2, 3]),
        masked=st.booleans(),
        scale=st.sampled_from([0.1, 0.5]),
        seed=st.integers(0, 2**31),
    )
)
def test_any_shape_and_any_options(operator: str, backend: str, problem: Problem) -> None:
    agree(problem, operator, backend, torch.float32, 1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reference", ["none", "shared"])
@pytest.mark.parametrize("trained", [True, False])
def test_errors_are_no_larger_than_plain_pytorchs(
    backend: str, dtype: torch.dtype, reference: str, trained: bool
) -> None:
    problem = Problem(rows=64, width=96, vocabulary=2000, reference=reference, trained=trained, scale=0.6, zero_every=5)
    exact = run(problem, "policy_loss", "reference", torch.float64)
    plain = plain_pytorch(problem, dtype).errors(exact)
    for operator in OPERATORS:
        for name, error in run(problem, operator, backend, dtype).errors(exact).items():
            assert error <= 1.5 * plain[name] + 1e-6, (operator, name, error, plain[name])


@pytest.mark.parametrize(("rows", "width"), [(150, 40), (60, 1024), (430, 512)])
@pytest.mark.parametrize("reference", ["none", "shared", "separate"])
def test_errors_of_many_rows_on_the_cpu(rows: int, width: int, reference: str) -> None:
    """Several blocks of rows, more than the weight's gradient has room for, and rows a multiple of 4 KiB long."""
    need("cpp")
    problem = Problem(rows=rows, width=width, vocabulary=700, reference=reference, scale=0.2, zero_every=5)
    exact = run(problem, "policy_loss", "reference", torch.float64)
    plain = plain_pytorch(problem, torch.float32).errors(exact)
    for operator in OPERATORS:
        for name, error in run(problem, operator, "cpp", torch.float32).errors(exact).items():
            assert error <= 3 * plain[name] + 1e-6, (operator, name, error, plain[name])


ADVERSARIAL = {
    "near -1e4": {"bias": -1e4},
    "offset +1e4": {"bias": 1e4},
    "peaked": {"hidden": 300.0},
    "flat": {"hidden": 0.0},
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_rows(backend: str, case: str) -> None:
    g = torch.Generator().manual_seed(0)
    change = ADVERSARIAL[case]
    hidden = torch.randn(5, 33, generator=g) * change.get("hidden", 1.0)
    hidden[3:] = hidden[2]  # duplicates
    weight = torch.randn(700, 33, generator=g)
    bias = torch.full((700,), change.get("bias", 0.0))
    target = torch.tensor([0, 699, 3, 3, 3])
    ref = torch.randn(5, 33, generator=g)

    def everything(logprob, entropy, kl, rows):
        one = torch.ones_like(logprob)
        return logprob + entropy + kl, one, one, one

    def call(dtype: torch.dtype, backend: str):
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype).requires_grad_()
        out = policy_loss(
            h,
            w,
            target,
            everything,
            bias=bias.to(dtype),
            ref_hidden=ref.to(dtype),
            ref_weight=weight.to(dtype),
            entropy=True,
            backend=backend,
        )
        return [*out[1:], *torch.autograd.grad(out.loss, [h, w])]

    exact, plain, ours = (
        call(torch.float64, "reference"),
        call(torch.float32, "reference"),
        call(torch.float32, backend),
    )
    for x, p, e in zip(ours, plain, exact, strict=True):
        assert x.isfinite().all()
        # What float32 logits of 1e4 have lost already is in the plain formula's error too.
        allowed = 1.5 * (p - e).abs().max() + 1e-6 * e.abs().max().clamp_min(1.0)
        assert (x - e).abs().max() <= allowed
    assert torch.equal(ours[1][2:3].expand(3), ours[1][2:])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_stays_that_rows_matter(backend: str, value: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=g), torch.randn(400, 16, generator=g)
    target, ref = torch.randint(400, (6,), generator=g), torch.randn(6, 16, generator=g)
    good = hidden.clone()
    hidden[2, 5] = value
    others = torch.tensor([0, 1, 3, 4, 5])

    def call(h):
        h = h.clone().requires_grad_()
        stats = linear_logprob(h, weight, target, ref_hidden=ref, entropy=True, backend=backend)
        (gradient,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum() + stats.kl.sum(), h)
        return [*stats, gradient]

    for bad, clean in zip(call(hidden), call(good), strict=True):
        assert bad[2].isnan().all()
        assert torch.equal(bad[others], clean[others])


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_a_token_ruled_out_by_its_bias(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 16, generator=g), torch.randn(700, 16, generator=g)
    ref = torch.randn(4, 16, generator=g)
    bias = torch.zeros(700)
    bias[:350] = -torch.inf  # whole tiles of them
    target = torch.tensor([350, 400, 500, 699])

    def call(weight, target, bias, backend):
        h = hidden.clone().requires_grad_()
        stats = linear_logprob(h, weight, target, bias=bias, ref_hidden=ref, entropy=True, backend=backend)
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in stats), h)
        return [*stats, gradient]

    for ours, allowed in zip(
        call(weight, target, bias, backend), call(weight[350:], target - 350, None, "reference"), strict=True
    ):
        torch.testing.assert_close(ours, allowed)
    token = linear_sample(hidden, weight, bias=bias, seeds=torch.arange(4), backend=backend).token
    assert (token >= 350).all()


def test_gradients_agree_with_finite_differences() -> None:
    a = replace(EVERYTHING, rows=5, width=4, vocabulary=9, rank=2).tensors(torch.float64)
    lora = a.pop("lora")
    variables = (a.pop("hidden"), a.pop("weight"), a.pop("bias"), lora.a, lora.b)

    def stats(hidden, weight, bias, lora_a, lora_b):
        lora = LoRA(lora_a, lora_b, 0.3)
        return linear_logprob(hidden, weight, bias=bias, lora=lora, backend="torch", **a)

    def loss(hidden, weight, bias, lora_a, lora_b):
        def callback(logprob, entropy, kl, rows):
            # Not linear, so that the coefficients depend on the statistics.
            return logprob.square() + entropy * kl, 2 * logprob, kl, entropy

        lora = LoRA(lora_a, lora_b, 0.3)
        return policy_loss(hidden, weight, coefficients=callback, bias=bias, lora=lora, backend="torch", **a).loss

    assert gradcheck(stats, variables)
    assert gradcheck(loss, variables)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", FAST)
def test_chunks_change_nothing_but_the_rounding(operator: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(EVERYTHING, rows=150, zero_every=4, masked=True)
    whole = run(problem, operator, backend, torch.float32)
    for most in (1, 7, 64):
        monkeypatch.setattr(backend_module(backend), "rows_in_flight", lambda head, dtype, most=most: most)
        parts = run(problem, operator, backend, torch.float32)
        for name, value in parts.values.items():
            torch.testing.assert_close(value, whole.values[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_inputs_give_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    problem = replace(EVERYTHING, rows=40)
    for operator in OPERATORS:
        first, second = (run(problem, operator, backend, dtype) for _ in range(2))
        for name, value in first.values.items():
            assert torch.equal(value, second.values[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_statistics_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    need("cpp")
    before = torch.get_num_threads()
    problem = Problem(rows=30, vocabulary=2000, reference="shared")
    try:
        torch.set_num_threads(threads)
        errors = run(problem, "policy_loss", "cpp", torch.float32).errors(
            run(problem, "policy_loss", "reference", torch.float64)
        )
    finally:
        torch.set_num_threads(before)
    assert max(errors.values()) < 2e-5


class Spy:
    """A backend that notes what the chunk loop asks of it."""

    def __init__(self, name: str) -> None:
        self._backend = backend_module(name)
        self.rows: list[int] = []
        self.gradients: list[fused.HeadGradients] = []
        self.active: list[torch.Tensor | None] = []

    def rows_in_flight(self, head, dtype) -> int:
        return 4

    def rows_in_gradient(self, head) -> int:
        return 0

    def forward(self, head, rows, *, entropy, keep):
        self.rows.append(len(rows.hidden))
        return self._backend.forward(head, rows, entropy=entropy, keep=keep)

    def backward(self, head, rows, kept, stats, active, alpha, eta, kappa, gradients) -> None:
        self.active.append(active)
        self.gradients.append(gradients)
        self._backend.backward(head, rows, kept, stats, active, alpha, eta, kappa, gradients)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    watched = Spy("torch")
    monkeypatch.setattr("alignpro_kernels.operators.backend_module", lambda name: watched)
    return watched


def weighted(weights: torch.Tensor):
    return lambda logprob, entropy, kl, rows: (weights[rows] * logprob, weights[rows], None, None)


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
    assert [None if x is None else x.tolist() for x in spy.active] == [[1, 3], None]  # of three chunks, one is skipped
    assert (hidden.grad[weights == 0] == 0).all()
    spy.rows.clear()
    logprob = linear_logprob(hidden, weight, target, backend="torch").logprob
    spy.rows.clear()
    (weights * logprob).sum().backward()
    assert sum(spy.rows) == 6  # nor are their logits made again


def test_a_frozen_head_has_no_gradient_computed_nor_allocated(spy: Spy) -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8)
    target = torch.zeros(6, dtype=torch.int64)
    policy_loss(hidden, weight, target, weighted(torch.ones(6)), backend="torch").loss.backward()
    assert all(g.weight is None and g.bias is None and g.hidden is not None for g in spy.gradients)
    with torch.no_grad():
        spy.gradients.clear()
        out = policy_loss(hidden, weight, target, weighted(torch.ones(6)), backend="torch")
    assert not spy.gradients and not out.loss.requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_backward_scales_and_can_be_repeated_where_it_is_retained(backend: str) -> None:
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


def test_the_leafs_gradient_is_the_one_made_in_the_forward_pass() -> None:
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


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20),
    vocabulary=st.integers(2, 3000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    softcap=st.sampled_from([None, 4.0]),
    rank=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**31),
)
def test_samples_are_the_references(backend, rows, vocabulary, temperature, softcap, rank, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, 16, generator=g), torch.randn(vocabulary, 16, generator=g)
    bias = torch.randn(vocabulary, generator=g)
    lora = LoRA(torch.randn(rank, 16, generator=g), torch.randn(vocabulary, rank, generator=g), 0.5) if rank else None
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g)
    tau = torch.full((rows,), temperature)
    tau[::3] = 0.0
    options = {"bias": bias, "lora": lora, "softcap": softcap, "temperature": tau, "seeds": seeds}
    ours = linear_sample(hidden, weight, backend=backend, **options)
    theirs = linear_sample(hidden, weight, backend="reference", **options)
    # A tie of two noisy logits to within rounding may go either way; it is one in a million.
    assert torch.equal(ours.token, theirs.token)
    torch.testing.assert_close(ours.logprob, theirs.logprob, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_every_instruction_set_computes_the_same(instructions: str) -> None:
    need("cpp")
    if instructions == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no AVX2 here")
    names = (
        "test_any_shape_and_any_options[cpp-policy_loss]",
        "test_samples_are_the_references[cpp]",
        "test_errors_are_no_larger_than_plain_pytorchs",
        "test_a_bad_row_stays_that_rows_matter",
        "test_adversarial_rows",
        "test_a_token_ruled_out_by_its_bias",
    )
    code = """if True:
        import sys, pytest
        from alignpro_kernels import backends, cpp_head
        backends()
        assert cpp_head.instructions() == sys.argv[1], cpp_head.instructions()
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not torch", *sys.argv[2:]]))
    """
    chosen = "generic" if instructions == "default" else instructions
    command = [sys.executable, "-c", code, chosen, *(f"{__file__}::{name}" for name in names)]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_memory_does_not_grow_with_the_rows() -> None:
    need("cpp")
    script = Path(__file__).with_name("peak_memory.py")
    peaks = [
        int(subprocess.run([sys.executable, script, str(rows)], capture_output=True, text=True, check=True).stdout)
        for rows in (3072, 6144)
    ]
    assert max(peaks) < 256, peaks  # their logits are 470 and 940 MiB


def test_memory_that_is_kept_serves_one_call_at_a_time() -> None:
    need("cpp")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(48, 16, generator=generator), torch.randn(70_000, 16, generator=generator)
    target = torch.randint(70_000, (48,), generator=generator)

    def gradient(coefficients: Coefficients) -> torch.Tensor:
        states = hidden.clone().requires_grad_()
        policy_loss(states, weight, target, coefficients, backend="cpp").loss.backward()
        assert states.grad is not None
        return states.grad

    def plain(logprob: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return -logprob, -torch.ones_like(logprob), None, None

    def nested(logprob: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        with torch.enable_grad():  # while the logits of the call around it wait for their coefficients
            inner.append(gradient(plain))
        return plain(logprob)

    cpp_head.release_workspace()
    fresh, inner = gradient(plain), []
    assert torch.equal(gradient(plain), fresh)  # in the memory of the first
    assert torch.equal(gradient(nested), fresh)
    assert torch.equal(inner[0], fresh)
    cpp_head.release_workspace()
    assert torch.equal(gradient(plain), fresh)
