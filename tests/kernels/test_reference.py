"""The reference operators, which are the specification, compared with torch.distributions, autograd and finite differences."""

import logging

import pytest
import torch
from scipy.stats import chisquare
from splitmix import seed_of
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence

from alignpro_kernels import (
    BackendError,
    LoRA,
    backends,
    gumbel_noise,
    linear_logprob,
    linear_sample,
    merge_states,
    policy_loss,
    splitmix64,
)

N, D, V = 6, 5, 7
HEADS = ["plain", "bias", "softcap", "temperature", "everything"]


def make_head(kind: str, *, grad: bool = True) -> tuple[dict, dict]:
    """Return inputs (hidden, weight, target, bias) and options of one kind of head, in float64."""
    g = torch.Generator().manual_seed(HEADS.index(kind))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    options: dict = {}
    if kind in ("bias", "everything"):
        options["bias"] = randn(V).requires_grad_(grad)
    if kind in ("softcap", "everything"):
        options["softcap"] = 1.5
    if kind in ("temperature", "everything"):
        options["temperature"] = torch.linspace(0.3, 2.0, N, dtype=torch.float64)
    inputs = {
        "hidden": randn(N, D).requires_grad_(grad),
        "weight": randn(V, D).requires_grad_(grad),
        "target": torch.randint(V, (N,), generator=g),
    }
    return inputs, options


def reference_arguments(kind: str) -> dict:
    g = torch.Generator().manual_seed(9)
    ref = {"ref_hidden": torch.randn(N, D, generator=g, dtype=torch.float64)}
    if kind == "separate":
        ref["ref_hidden"] = torch.randn(N, 3, generator=g, dtype=torch.float64)  # of another width
        ref["ref_weight"] = torch.randn(V, 3, generator=g, dtype=torch.float64)
        ref["ref_bias"] = torch.randn(V, generator=g, dtype=torch.float64)
    return ref


def logits_by_hand(hidden, weight, *, bias=None, softcap=None, temperature=1.0) -> torch.Tensor:
    z = torch.einsum("nd,vd->nv", hidden, weight) + (0.0 if bias is None else bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("reference", ["shared", "separate"])
def test_statistics_equal_those_of_torch_distributions(kind: str, reference: str) -> None:
    inputs, options = make_head(kind, grad=False)
    ref = reference_arguments(reference)
    stats = linear_logprob(**inputs, **options, **ref, entropy=True)
    p = Categorical(logits=logits_by_hand(inputs["hidden"], inputs["weight"], **options))
    shared = reference == "shared"
    q_options = options | ({} if shared else {"bias": ref["ref_bias"]})
    q_weight = inputs["weight"] if shared else ref["ref_weight"]
    q = Categorical(logits=logits_by_hand(ref["ref_hidden"], q_weight, **q_options))
    torch.testing.assert_close(stats.logprob, p.log_prob(inputs["target"]), rtol=0, atol=1e-13)
    torch.testing.assert_close(stats.entropy, p.entropy(), rtol=0, atol=1e-13)
    torch.testing.assert_close(stats.kl, kl_divergence(p, q), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("reference", ["shared", "separate"])
@pytest.mark.parametrize("coefficients", ["alpha", "eta", "kappa", "mixed"])
def test_row_formula_is_the_gradient(kind: str, reference: str, coefficients: str) -> None:
    inputs, options = make_head(kind)
    ref = reference_arguments(reference)
    g = torch.Generator().manual_seed(3)
    alpha, eta, kappa = (
        torch.randn(N, generator=g, dtype=torch.float64) if coefficients in (name, "mixed") else None
        for name in ("alpha", "eta", "kappa")
    )
    variables = [inputs["hidden"], inputs["weight"], *([options["bias"]] if "bias" in options else [])]

    stats = linear_logprob(**inputs, **options, **ref, entropy=True)
    terms = [
        c * s
        for c, s in zip((alpha, eta, kappa), (stats.logprob, stats.entropy, stats.kl), strict=True)
        if c is not None
    ]
    by_autograd = torch.autograd.grad(torch.stack(terms).sum(), variables)

    def callback(logprob, entropy, kl, rows):
        parts = zip((alpha, eta, kappa), (logprob, entropy, kl), strict=True)
        return torch.stack([c * s for c, s in parts if c is not None]).sum(0), alpha, eta, kappa

    out = policy_loss(inputs["hidden"], inputs["weight"], inputs["target"], callback, **options, **ref, entropy=True)
    torch.testing.assert_close(out.loss, torch.stack(terms).sum(), rtol=0, atol=1e-12)
    by_formula = torch.autograd.grad(out.loss, variables)
    for ours, truth in zip(by_formula, by_autograd, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    inputs, options = make_head(kind)
    ref = reference_arguments("separate")
    bias = options.pop("bias", torch.zeros(V, dtype=torch.float64, requires_grad=True))

    def stats(hidden, weight, bias):
        return linear_logprob(hidden, weight, inputs["target"], bias=bias, **options, **ref, entropy=True)

    def loss(hidden, weight, bias):
        def callback(logprob, entropy, kl, rows):
            # The loss is not linear, so that the coefficients depend on the statistics.
            terms = logprob.square() + entropy * kl
            return terms, 2 * logprob, kl, entropy

        return policy_loss(hidden, weight, inputs["target"], callback, bias=bias, **options, **ref, entropy=True).loss

    assert gradcheck(stats, (inputs["hidden"], inputs["weight"], bias))
    assert gradcheck(loss, (inputs["hidden"], inputs["weight"], bias))


def test_no_gradient_flows_through_the_reference_of_a_shared_head() -> None:
    inputs, _ = make_head("plain")
    ref_hidden = reference_arguments("shared")["ref_hidden"].requires_grad_()
    linear_logprob(**inputs, ref_hidden=ref_hidden).kl.sum().backward()
    shared = inputs["weight"].grad.clone()
    inputs["weight"].grad = None
    frozen = inputs["weight"].detach().clone()
    linear_logprob(**inputs, ref_hidden=ref_hidden, ref_weight=frozen).kl.sum().backward()
    assert torch.equal(shared, inputs["weight"].grad)
    assert ref_hidden.grad is None


def constant(alpha: float):
    return lambda logprob, entropy, kl, rows: (alpha * logprob, torch.full_like(logprob, alpha), None, None)


def test_backward_scales_the_gradient_and_skips_a_frozen_head() -> None:
    inputs, _ = make_head("plain")
    inputs["weight"].requires_grad_(False)
    args = (inputs["hidden"], inputs["weight"], inputs["target"])
    (once,) = torch.autograd.grad(policy_loss(*args, constant(1.0)).loss, inputs["hidden"])
    (thrice,) = torch.autograd.grad(3 * policy_loss(*args, constant(1.0)).loss, inputs["hidden"])
    torch.testing.assert_close(thrice, 3 * once)
    policy_loss(*args, constant(1.0)).loss.backward()
    assert inputs["weight"].grad is None
    with torch.no_grad():
        assert not policy_loss(*args, constant(1.0)).loss.requires_grad


def test_rows_with_zero_coefficients_contribute_nothing() -> None:
    inputs, _ = make_head("plain")
    keep = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)

    def masked(logprob, entropy, kl, rows):
        return keep * logprob, keep.clone(), None, None

    out = policy_loss(inputs["hidden"], inputs["weight"], inputs["target"], masked)
    dh, dw = torch.autograd.grad(out.loss, [inputs["hidden"], inputs["weight"]])
    assert (dh[keep == 0] == 0).all()
    assert (dh[keep == 1] != 0).any(1).all()
    kept = keep == 1
    part = policy_loss(inputs["hidden"][kept], inputs["weight"], inputs["target"][kept], constant(1.0))
    torch.testing.assert_close(dw, torch.autograd.grad(part.loss, inputs["weight"])[0])


@pytest.mark.parametrize("case", ["near_minus_1e4", "offset_plus_1e4", "peaked", "flat", "duplicates"])
def test_adversarial_rows_in_float32(case: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    bias = torch.zeros(V)
    if case == "near_minus_1e4":
        bias -= 1e4
    elif case == "offset_plus_1e4":
        bias += 1e4
    elif case == "peaked":
        hidden *= 300
    elif case == "flat":
        hidden *= 0
    else:  # products of eighths are exact: a BLAS may sum the rows of one product in different orders
        hidden[:] = (hidden[0] * 8).round() / 8
        weight = (weight * 8).round() / 8
    target = torch.tensor([0, V - 1, 3, 3])
    hidden.requires_grad_()

    def everything(logprob, entropy, kl, rows):
        one = torch.ones_like(logprob)
        return logprob + entropy + kl, one, one, one

    ref = {"ref_hidden": torch.randn(4, D, generator=g)}
    out = policy_loss(hidden, weight, target, everything, bias=bias, entropy=True, **ref)
    exact = {name: value.double() for name, value in (("bias", bias), ("ref_hidden", ref["ref_hidden"]))}
    wide = hidden.detach().double().requires_grad_()
    truth = policy_loss(wide, weight.double(), target, everything, entropy=True, **exact)
    # A logit of 1e4 has a unit in the last place of 1e-3, so the inputs already have that error.
    atol = 5e-3 if "1e4" in case else 5e-4
    for ours, expected in zip(out[1:], truth[1:], strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=atol)
    (ours,), (expected,) = torch.autograd.grad(out.loss, hidden), torch.autograd.grad(truth.loss, wide)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=atol)
    if case == "duplicates":
        assert torch.equal(out.entropy, out.entropy[:1].expand(4))


def test_no_rows_give_a_zero_loss_with_zero_gradients() -> None:
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)

    def never(*_):
        raise AssertionError("called without rows")

    out = policy_loss(hidden, weight, target, never, ref_hidden=hidden.detach(), entropy=True)
    out.loss.backward()
    assert out.loss == 0 and out.kl.shape == (0,)
    assert hidden.grad.shape == (0, D) and (weight.grad == 0).all()
    assert linear_logprob(hidden, weight, target).logprob.shape == (0,)
    assert linear_sample(hidden, weight, seeds=target).token.shape == (0,)


def test_one_row_without_leading_dimension() -> None:
    hidden, weight = torch.randn(D, requires_grad=True), torch.randn(V, D)
    target = torch.tensor(2)
    stats = linear_logprob(hidden, weight, target, entropy=True)
    torch.testing.assert_close(stats.logprob, (weight @ hidden).log_softmax(-1)[2])
    out = policy_loss(hidden, weight, target, constant(1.0))
    (expected,) = torch.autograd.grad(stats.logprob, hidden)
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden)[0], expected)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    inputs, options = make_head("everything", grad=False)
    flat = linear_logprob(**inputs, **options, entropy=True)
    hidden = inputs["hidden"].view(2, 3, D).transpose(0, 1)  # not contiguous
    target = inputs["target"].view(2, 3).T
    options["temperature"] = options["temperature"].view(2, 3).T
    shaped = linear_logprob(hidden, inputs["weight"], target, **options, entropy=True)
    torch.testing.assert_close(shaped.logprob, flat.logprob.view(2, 3).T)

    seen = []

    def record(logprob, entropy, kl, rows):
        seen.append((logprob, rows))
        return logprob, torch.ones_like(logprob), None, None

    hidden = hidden.requires_grad_()
    out = policy_loss(hidden, inputs["weight"], target, record, **options)
    assert torch.equal(torch.cat([rows for _, rows in seen]), torch.arange(N))
    torch.testing.assert_close(seen[0][0], shaped.logprob.flatten())
    assert out.logprob.shape == (3, 2) and torch.autograd.grad(out.loss, hidden)[0].shape == (3, 2, D)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_row_of_probability_zero_is_left_out_if_its_coefficients_are_zero(backend: str) -> None:
    hidden, weight = torch.randn(3, D), torch.randn(V, D)
    bias = torch.zeros(V).index_fill(0, torch.tensor([2]), -torch.inf)
    alpha = torch.tensor([-1.0, 0.0, 2.0])  # the second row's token is ruled out

    def loss(logprob, entropy, kl, rows):
        return torch.where(alpha[rows] == 0, 0.0, alpha[rows] * logprob), alpha[rows], None, None

    def call(token: int) -> tuple[torch.Tensor, torch.Tensor]:
        h = hidden.clone().requires_grad_()
        out = policy_loss(h, weight, torch.tensor([1, token, 3]), loss, bias=bias, backend=backend)
        out.loss.backward()
        assert out.logprob[1].isinf() == (token == 2)
        return out.loss.detach(), h.grad

    (found, gradient), (expected, of_allowed) = call(2), call(4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, of_allowed)
    assert (gradient[1] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_float32_statistics_also_under_autocast(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(32, 16, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=g).to(dtype).requires_grad_()
    target = torch.randint(50, (32,), generator=g)
    truth = linear_logprob(hidden.detach().double(), weight.detach().double(), target, entropy=True)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            stats = linear_logprob(hidden, weight, target, entropy=True)
            out = policy_loss(hidden, weight, target, constant(0.1))
        assert stats.logprob.dtype == stats.entropy.dtype == out.loss.dtype == torch.float32
        torch.testing.assert_close(stats.logprob.double(), truth.logprob, rtol=0, atol=1e-5)
        dh, dw = torch.autograd.grad(out.loss, [hidden, weight])
        assert dh.dtype == dw.dtype == dtype


def test_the_results_of_the_callable_are_checked() -> None:
    inputs, _ = make_head("plain")
    args = (inputs["hidden"], inputs["weight"], inputs["target"])
    ones = torch.ones(N, dtype=torch.float64)
    with pytest.raises(ValueError, match="loss_terms has shape"):
        policy_loss(*args, lambda *_: (ones.sum(), ones, None, None))
    with pytest.raises(ValueError, match="alpha has shape"):
        policy_loss(*args, lambda *_: (ones, ones[:2], None, None))
    with pytest.raises(ValueError, match=r"eta given.*entropy=True"):
        policy_loss(*args, lambda *_: (ones, None, ones, None))
    with pytest.raises(ValueError, match=r"kappa given.*ref_hidden"):
        policy_loss(*args, lambda *_: (ones, None, None, ones))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, "hidden is torch.int64"),
        ({"hidden": torch.zeros(N, D + 1)}, r"hidden has shape \(6, 6\) and weight"),
        ({"weight": torch.zeros(V, D, dtype=torch.float64)}, "weight is torch.float64"),
        ({"weight": torch.zeros(0, D)}, "weight.*must not be empty"),
        ({"target": torch.zeros(N)}, "target is torch.float32"),
        ({"target": torch.zeros(N + 1, dtype=torch.int64)}, r"target has shape \(7,\)"),
        ({"target": torch.full((N,), V)}, "target: row 0 has 7, outside the vocabulary of 7"),
        ({"target": torch.full((N,), -100)}, "target: row 0 has -100.*use mask to leave out"),
        ({"bias": torch.zeros(V + 1)}, "bias has shape"),
        ({"mask": torch.ones(N)}, "mask is torch.float32"),
        ({"mask": torch.ones(N + 1, dtype=torch.bool)}, r"mask has shape \(7,\)"),
        ({"lora": LoRA(torch.zeros(2, D + 1), torch.zeros(V, 2), 1.0)}, r"lora: a has shape \(2, 6\)"),
        ({"lora": LoRA(torch.zeros(2, D), torch.zeros(V, 2).bfloat16(), 1.0)}, "lora: b is torch.bfloat16"),
        ({"temperature": 0.0}, "temperature: got 0.0, it must be positive"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": torch.tensor([1.0, 1, 1, -1, 1, 1])}, "temperature: got -1.0"),
        ({"temperature": torch.ones(2)}, r"temperature has shape \(2,\)"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"ref_weight": torch.zeros(V, D)}, "ref_weight given without ref_hidden"),
        ({"ref_hidden": torch.zeros(N - 1, D)}, "ref_hidden has shape"),
        ({"ref_hidden": torch.zeros(N, D + 2)}, "ref_hidden has shape.* and weight"),
        ({"ref_hidden": torch.zeros(N, D), "ref_weight": torch.zeros(V + 1, D)}, "ref_weight has a vocabulary of 8"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    good = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D), "target": torch.zeros(N, dtype=torch.int64)}
    arguments = good | change
    with pytest.raises((ValueError, TypeError), match=message):
        linear_logprob(**arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        policy_loss(coefficients=constant(1.0), **arguments)


def test_an_unknown_backend_is_an_error_and_the_one_in_use_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    hidden, weight, target = torch.zeros(1, D), torch.zeros(V, D), torch.zeros(1, dtype=torch.int64)
    assert backends()["reference"] is None
    with pytest.raises(BackendError, match="there is no backend 'warp'"):
        linear_logprob(hidden, weight, target, backend="warp")
    from alignpro_kernels.backends import _log_choice

    _log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="alignpro_kernels"):
        for _ in range(3):
            linear_logprob(hidden, weight, target, backend="reference")
    assert [record.message for record in caplog.records] == ["linear_logprob runs on backend reference"]


# ------------------------------------------------------------------------------------------------------------- sampling


def test_splitmix64_gives_the_published_outputs() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    ours = splitmix64(torch.tensor([1234567]), 4)[0].tolist()
    assert [value % (1 << 64) for value in ours] == published


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_at_both_ends_of_the_hash(dtype: torch.dtype) -> None:
    lowest_and_highest = torch.tensor([seed_of(0), seed_of(-1)])
    assert splitmix64(lowest_and_highest, 1).flatten().tolist() == [0, -1]
    noise = gumbel_noise(lowest_and_highest, 1, dtype).flatten()
    assert noise[0] == pytest.approx(-3.604, abs=1e-2) and noise[1] == pytest.approx(36.74, abs=1e-2)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.arange(200), 500, torch.float64)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature: float) -> None:
    count = 20_000
    hidden = torch.randn(1, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp = (hidden @ weight.T / temperature).log_softmax(-1)[0]
    out = linear_sample(hidden.expand(count, D), weight, temperature=temperature, seeds=torch.arange(count))
    observed = torch.bincount(out.token, minlength=V)
    assert chisquare(observed.numpy(), (logp.exp() * count).numpy()).pvalue > 1e-3
    torch.testing.assert_close(out.logprob, logp[out.token])
    torch.testing.assert_close(out.entropy, -(logp.exp() * logp).sum().expand(count))


def test_a_sample_depends_only_on_its_row() -> None:
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(40, 16, generator=g), torch.randn(300, 16, generator=g)
    seeds = torch.randint(-(2**62), 2**62, (40,), generator=g)
    together = linear_sample(hidden, weight, seeds=seeds).token
    alone = [linear_sample(hidden[i : i + 1], weight, seeds=seeds[i : i + 1]).token for i in range(40)]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(40, generator=g)
    assert torch.equal(together[order], linear_sample(hidden[order], weight, seeds=seeds[order]).token)
    assert not torch.equal(together, linear_sample(hidden, weight, seeds=seeds + 1).token)


def test_temperature_zero_is_greedy_row_by_row() -> None:
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = torch.randn(4, D, generator=g), torch.randn(V, D, generator=g), torch.randn(V, generator=g)
    seeds = torch.arange(4)
    temperature = torch.tensor([0.0, 1.0, 0.0, 2.0])
    out = linear_sample(hidden, weight, bias=bias, temperature=temperature, softcap=3.0, seeds=seeds)
    logits = logits_by_hand(hidden, weight, bias=bias, softcap=3.0)
    assert torch.equal(out.token[[0, 2]], logits.argmax(-1)[[0, 2]])
    assert (out.logprob[[0, 2]] == 0).all() and (out.entropy[[0, 2]] == 0).all()
    warm = (logits / torch.tensor([[1.0], [1.0], [1.0], [2.0]])).log_softmax(-1)
    torch.testing.assert_close(out.logprob[[1, 3]], warm[[1, 3], out.token[[1, 3]]])
    assert torch.equal(
        linear_sample(hidden, weight, temperature=0.0, seeds=seeds).token, (hidden @ weight.T).argmax(-1)
    )
    with pytest.raises(ValueError, match=r"temperature: got -0\.1, it must be not negative"):
        linear_sample(hidden, weight, temperature=-0.1, seeds=seeds)
    with pytest.raises(TypeError, match=r"seeds is torch\.float32"):
        linear_sample(hidden, weight, seeds=seeds.float())


# -------------------------------------------------------------------------------------------------------------- merging


def test_merged_parts_give_the_whole_attention() -> None:
    g = torch.Generator().manual_seed(4)
    scores, values = torch.randn(2, 3, 12, generator=g) * 20, torch.randn(2, 3, 12, D, generator=g)
    outs, lses = [], []
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        outs.append((scores[..., part].softmax(-1).unsqueeze(-1) * values[..., part, :]).sum(-2))
        lses.append(scores[..., part].logsumexp(-1))
    whole = (scores.softmax(-1).unsqueeze(-1) * values).sum(-2)
    torch.testing.assert_close(merge_states(outs, lses), whole)
    torch.testing.assert_close(merge_states(torch.stack(outs), torch.stack(lses)), whole)
    assert merge_states([out.bfloat16() for out in outs], lses).dtype == torch.bfloat16


def test_an_empty_part_is_ignored_whatever_its_values() -> None:
    out, lse = torch.randn(2, D), torch.tensor([1e4, -1e4])
    empty = torch.full((2, D), float("nan"))
    minus = torch.full((2,), -torch.inf)
    torch.testing.assert_close(merge_states([empty, out], [minus, lse]), out)
    assert (merge_states([empty, empty], [minus, minus]) == 0).all()
    with pytest.raises(ValueError, match="outs has 2 parts, lses 1"):
        merge_states([out, out], [lse])


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_empty_part_gets_and_spoils_no_gradient(everywhere: bool) -> None:
    out, lse = torch.randn(2, D, requires_grad=True), torch.tensor([0.3, -torch.inf if everywhere else 2.0])
    other, more = torch.randn(2, D, requires_grad=True), torch.tensor([1.0, -torch.inf if everywhere else -1.0])
    empty = torch.full((2, D), float("nan"), requires_grad=True)
    lses = [lse.requires_grad_(), torch.full((2,), -torch.inf, requires_grad=True), more.requires_grad_()]
    merge_states([out, empty, other], lses).square().sum().backward()
    found = [x.grad.clone() for x in (out, other, lse, more)]
    assert (empty.grad == 0).all() and (lses[1].grad == 0).all()
    for x in (out, other, lse, more):
        x.grad = None
    merge_states([out, other], [lse, more]).square().sum().backward()
    for ours, expected in zip(found, (out, other, lse, more), strict=True):
        torch.testing.assert_close(ours, expected.grad)
