"""The fast backends compared with the float64 reference: values, gradients, bad rows, samples, every instruction set."""

from __future__ import annotations

import functools

import pytest
import torch
from fast_backends import FAST, OPERATORS, need
from fewer_instructions import FEWER, run_with
from head_problems import Problem, plain_pytorch, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignpro_kernels import LoRA, linear_logprob, linear_sample, policy_loss

pytestmark = pytest.mark.usefixtures("runnable")


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
def test_errors_are_no_larger_than_those_of_a_plain_implementation(
    backend: str, dtype: torch.dtype, reference: str, trained: bool
) -> None:
    problem = Problem(rows=64, width=96, vocabulary=2000, reference=reference, trained=trained, scale=0.6, zero_every=5)
    exact = run(problem, "policy_loss", "reference", torch.float64)
    plain = plain_pytorch(problem, dtype).errors(exact)
    for operator in OPERATORS:
        for name, error in run(problem, operator, backend, dtype).errors(exact).items():
            assert error <= 1.5 * plain[name] + 1e-6, (operator, name, error, plain[name])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [True, False])
def test_a_lora_on_a_16_bit_head_is_as_exact_as_the_reference(backend: str, dtype: torch.dtype, trained: bool) -> None:
    """The gradient of the hidden states is a sum of two parts, each of which is rounded."""
    problem = Problem(rows=40, width=96, vocabulary=2000, rank=16, trained=trained, scale=0.2, zero_every=5)
    exact = run(problem, "policy_loss", "reference", torch.float64)
    for operator in OPERATORS:
        least = run(problem, operator, "reference", dtype).errors(exact)
        for name, error in run(problem, operator, backend, dtype).errors(exact).items():
            assert error <= 2 * least[name] + 1e-6, (operator, name, error, least[name])


@pytest.mark.parametrize(("rows", "width"), [(150, 40), (60, 1024), (430, 512)])
@pytest.mark.parametrize("reference", ["none", "shared", "separate"])
def test_errors_of_many_rows_on_the_cpu(rows: int, width: int, reference: str) -> None:
    """Several blocks of rows, more rows than the weight's gradient can hold, and row lengths of a multiple of 4 KiB."""
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
    # Duplicates. Products of eighths are exact: a BLAS may sum the rows of one product in different orders.
    hidden[2:] = (hidden[2] * 8).round() / 8
    weight = (torch.randn(700, 33, generator=g) * 8).round() / 8
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
        # The rounding of float32 logits of 1e4 is part of the plain formula's error too.
        allowed = 1.5 * (p - e).abs().max() + 1e-6 * e.abs().max().clamp_min(1.0)
        assert (x - e).abs().max() <= allowed
    assert torch.equal(ours[1][2:3].expand(3), ours[1][2:])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_does_not_affect_others(backend: str, value: float) -> None:
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
@pytest.mark.parametrize("rows", [slice(None), slice(5, 6), slice(399, 400)])
def test_a_nan_in_the_weight_is_told_at_any_temperature(backend: str, rows: slice) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=g), torch.randn(400, 16, generator=g)
    temperature = torch.tensor([0.0, 1.0] * 3)
    draw = functools.partial(linear_sample, hidden, seeds=torch.arange(6), temperature=temperature, backend=backend)
    assert (draw(weight).logprob[::2] == 0).all() and (draw(weight).entropy[::2] == 0).all()
    weight[rows] = torch.nan
    out = draw(weight)
    assert out.logprob.isnan().all() and out.entropy.isnan().all()


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_a_token_ruled_out_by_its_bias(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 16, generator=g), torch.randn(700, 16, generator=g)
    ref = torch.randn(4, 16, generator=g)
    bias = torch.zeros(700)
    bias[:350] = -torch.inf  # covers whole tiles
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
def test_samples_equal_the_references(backend, rows, vocabulary, temperature, softcap, rank, seed) -> None:
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
    # If two noisy logits are equal up to rounding, either may win; this happens once in a million.
    assert torch.equal(ours.token, theirs.token)
    torch.testing.assert_close(ours.logprob, theirs.logprob, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", FEWER)
def test_the_same_holds_with_fewer_instructions(instructions: str) -> None:
    names = (
        "test_any_shape_and_any_options[cpp-policy_loss]",
        "test_samples_equal_the_references[cpp]",
        "test_errors_are_no_larger_than_those_of_a_plain_implementation",
        "test_a_bad_row_does_not_affect_others",
        "test_adversarial_rows",
        "test_a_token_ruled_out_by_its_bias",
    )
    run_with(instructions, "-k", "not torch", *(f"{__file__}::{name}" for name in names))
