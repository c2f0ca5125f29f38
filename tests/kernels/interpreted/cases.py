"""Heads and rows as test cases, with their results in float64 and by the plain formula in their own dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignpro_kernels import reference
from alignpro_kernels.head import Head, HeadGradients, Rows

torch.set_num_threads(1)
HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]
Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    head: Head
    rows: Rows
    entropy: bool
    coefficients: tuple[Tensor | None, ...]  # alpha, eta, kappa


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    count: int = 13,
    width: int = 40,
    vocabulary: int = 150,
    bias: bool = False,
    softcap: float | None = None,
    temperature: float | str = 1.0,
    rank: int = 0,
    ref: str | None = None,
    entropy: bool = True,
    coefficients: str = "alpha eta kappa",
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    weight = (randn(vocabulary, width) * scale / width**0.5).to(dtype)
    offset = randn(vocabulary).to(dtype) if bias else None
    ref_width = width if ref == "shared" else 24
    separate = (randn(vocabulary, 24) * scale / 24**0.5).to(dtype)
    ref_weight = {None: None, "shared": weight, "separate": separate}[ref]
    head = Head(
        weight,
        offset,
        softcap,
        (randn(vocabulary, rank) / max(1, rank)).to(dtype) if rank else None,
        ref_weight,
        offset if ref else None,
    )
    rows = Rows(
        randn(count, width).to(dtype),
        torch.randint(vocabulary, (count,), generator=g),
        torch.rand(count, generator=g) + 0.5 if temperature == "rows" else float(temperature),
        randn(count, rank).to(dtype) if rank else None,
        randn(count, ref_width).to(dtype) if ref else None,
    )
    drawn = {name: randn(count) for name in ("alpha", "eta", "kappa") if name in coefficients}
    given = {"alpha": True, "eta": entropy, "kappa": ref is not None}
    return Case(head, rows, entropy, tuple(drawn.get(name) if needed else None for name, needed in given.items()))


def oracle(case: Case) -> tuple[list[Tensor | None], Gradient]:
    """Return the reference's statistics and gradients in float64. A low-rank part is appended to both sides of the product."""
    head, rows = case.head, case.rows
    hidden, weight, bias = (None if x is None else x.double() for x in (rows.hidden, head.weight, head.bias))
    width = hidden.shape[1]
    if rows.lora_hidden is not None:
        hidden = torch.cat((hidden, rows.lora_hidden.double()), 1)
        weight = torch.cat((weight, head.lora_b.double()), 1)
    variables = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    tau = rows.temperature
    zero = torch.zeros(len(hidden), dtype=torch.float64)
    alpha, eta, kappa = (None if x is None else x.double() for x in case.coefficients)
    out = reference.policy_loss(
        hidden,
        weight,
        rows.target,
        lambda *_: (zero, alpha, eta, kappa),
        bias=bias,
        temperature=tau.double() if isinstance(tau, Tensor) else tau,
        softcap=head.softcap,
        ref_hidden=None if rows.ref_hidden is None else rows.ref_hidden.double(),
        ref_weight=None if head.ref_weight is None else head.ref_weight.double(),
        ref_bias=None if head.ref_bias is None else head.ref_bias.double(),
        entropy=case.entropy,
    )
    grads = torch.autograd.grad(out.loss, variables)
    gradient = {"hidden": grads[0][:, :width], "weight": grads[1][:, :width]}
    if rows.lora_hidden is not None:
        gradient |= {"lora_hidden": grads[0][:, width:], "lora_b": grads[1][:, width:]}
    if bias is not None:
        gradient["bias"] = grads[2]
    return [out.logprob, out.entropy, out.kl], gradient


def plain(case: Case) -> tuple[list[Tensor | None], Gradient]:
    """Compute the formula directly: products in the inputs' dtype, softmax in float32, autograd."""
    head, rows = case.head, case.rows
    named = {"hidden": rows.hidden, "weight": head.weight, "bias": head.bias}
    named |= {"lora_hidden": rows.lora_hidden, "lora_b": head.lora_b}
    leaf = {name: x.clone().requires_grad_() for name, x in named.items() if x is not None}
    tau = rows.temperature.unsqueeze(1) if isinstance(rows.temperature, Tensor) else rows.temperature

    def logp(u: Tensor) -> Tensor:
        u = u.float()
        if head.softcap is not None:
            u = head.softcap * torch.tanh(u / head.softcap)
        return (u / tau).log_softmax(-1)

    u = torch.nn.functional.linear(leaf["hidden"], leaf["weight"], leaf.get("bias"))
    if "lora_b" in leaf:
        u = u + leaf["lora_hidden"] @ leaf["lora_b"].T
    policy = logp(u)
    p = policy.exp()
    stats: list[Tensor | None] = [policy.gather(1, rows.target.unsqueeze(1)).squeeze(1), None, None]
    if case.entropy:
        stats[1] = -(p * policy).sum(1)
    if head.ref_weight is not None:
        with torch.no_grad():
            ref = logp(torch.nn.functional.linear(rows.ref_hidden, head.ref_weight, head.ref_bias))
        stats[2] = (p * (policy - ref)).sum(1)
    loss = sum((c * s).sum() for c, s in zip(case.coefficients, stats, strict=True) if c is not None)
    grads = torch.autograd.grad(loss, list(leaf.values()), allow_unused=True)
    return [None if x is None else x.detach() for x in stats], dict(zip(leaf, grads, strict=True))


def empty_gradients(case: Case, *, frozen: bool = False, accumulate: bool = False) -> HeadGradients:
    """Return gradient buffers, filled with NaN, which must be overwritten, or with ones, to be accumulated into."""

    def like(x: Tensor | None, dtype: torch.dtype | None = None, value: float = torch.nan) -> Tensor | None:
        return None if x is None else torch.full_like(x, value, dtype=dtype)

    head, rows = case.head, case.rows
    value = 1.0 if accumulate else torch.nan
    return HeadGradients(
        like(rows.hidden),
        like(rows.lora_hidden),
        None if frozen else like(head.weight, torch.float32, value),
        None if frozen else like(head.bias, torch.float32, value),
        like(head.lora_b, torch.float32, value),
        accumulate,
    )


def with_rows(case: Case, **changes: Tensor) -> Case:
    return replace(case, rows=case.rows._replace(**changes))


def assert_as_good(got: Tensor | None, exact: Tensor | None, usual: Tensor | None, what: str) -> None:
    """Check that the error is at most 1.5 times the plain formula's plus 1e-6 (relative to values above 1)."""
    if exact is None:
        assert got is None, f"{what} was not asked for"
        return
    assert got is not None and usual is not None
    error = (got.double() - exact).abs().max().item()
    allowed = 1.5 * (usual.double() - exact).abs().max().item() + 1e-6 * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
