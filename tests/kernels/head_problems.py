"""Inputs for the head's operators in any dtype, the results of a call, and their errors against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels import LoRA, linear_logprob, policy_loss


@dataclass(frozen=True)
class Problem:
    """One head, some rows, and three coefficients per row."""

    rows: int = 13
    width: int = 24
    vocabulary: int = 777
    trained: bool = True
    bias: bool = False
    rank: int = 0
    reference: str = "none"  # none, shared, separate
    softcap: float | None = None
    temperatures: bool = False
    coefficients: str = "mixed"  # alpha, eta, kappa, mixed
    zero_every: int = 0
    masked: bool = False
    scale: float = 0.5
    seed: int = 0

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Return the arguments. They are rounded to bfloat16 first, so that all dtypes hold the same numbers."""
        g = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).bfloat16().to(device, dtype)

        n, d, v = self.rows, self.width, self.vocabulary
        arguments: dict[str, Any] = {
            "hidden": randn(n, d).requires_grad_(),
            "weight": randn(v, d, scale=self.scale).requires_grad_(self.trained),
            "target": torch.randint(v, (n,), generator=g).to(device),
            "softcap": self.softcap,
            "entropy": True,
        }
        arguments["target"][:1] = v - 1  # in the last tile, which is usually partial
        if self.bias:
            arguments["bias"] = randn(v).requires_grad_()
        if self.rank:
            arguments["lora"] = LoRA(randn(self.rank, d).requires_grad_(), randn(v, self.rank).requires_grad_(), 0.3)
        if self.reference == "shared":
            arguments["ref_hidden"] = randn(n, d)
        elif self.reference == "separate":
            arguments["ref_hidden"] = randn(n, 9)
            arguments["ref_weight"], arguments["ref_bias"] = randn(v, 9), randn(v)
        if self.temperatures:
            arguments["temperature"] = torch.linspace(0.5, 2.0, n, dtype=torch.float64).to(
                device, torch.float64 if dtype == torch.float64 else torch.float32
            )
        if self.masked:
            arguments["mask"] = (torch.rand(n, generator=g) > 0.4).to(device)
        return arguments

    def upstream(self) -> Tensor:
        """Return the coefficients α, η, κ, (3, N) float64."""
        c = torch.randn(3, self.rows, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)
        for index, name in enumerate(("alpha", "eta", "kappa")):
            if self.coefficients not in (name, "mixed"):
                c[index] = 0
        if self.zero_every:
            c[:, :: self.zero_every] = 0
        return c

    @property
    def with_reference(self) -> bool:
        return self.reference != "none"


@dataclass
class Result:
    """Results of one call, by name; on the CPU, wherever they were computed, so that they compare with any others."""

    values: dict[str, Tensor] = field(default_factory=dict)

    def errors(self, exact: Result) -> dict[str, float]:
        """Return the largest error of each result against float64, relative to its largest value.

        That value is taken as at least 0.01, since a KL may be almost zero, and at least 1 for the loss, whose terms may
        cancel.
        """
        assert self.values.keys() == exact.values.keys()
        return {
            name: float((value.double() - exact.values[name]).abs().max())
            / max(float(exact.values[name].abs().max()), 1.0 if name == "loss" else 1e-2)
            for name, value in self.values.items()
            if value.numel()
        }


def run(
    problem: Problem,
    operator: str,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    weights: torch.dtype | None = None,
) -> Result:
    """Return statistics, loss and gradients of `policy_loss` or `linear_logprob`; heads may have another dtype, ``weights``."""
    arguments = problem.tensors(dtype, device)
    for name in ("weight", "bias", "ref_weight", "ref_bias"):
        if weights is not None and name in arguments:
            arguments[name] = arguments[name].detach().to(weights).requires_grad_(arguments[name].requires_grad)
    upstream = problem.upstream().to(device)
    if operator == "policy_loss":

        def coefficients(logprob, entropy, kl, rows):
            alpha, eta, kappa = upstream.to(logprob.dtype)[:, rows]
            terms = alpha * logprob + eta * entropy + (kappa * kl if kl is not None else 0)
            return terms, alpha, eta, kappa if kl is not None else None

        out = policy_loss(coefficients=coefficients, backend=backend, **arguments)
        loss, stats = out.loss, out[1:]
    else:
        stats = linear_logprob(backend=backend, **arguments)
        terms = zip(upstream.to(stats.logprob.dtype), stats, strict=True)
        loss = sum((c * s).sum() for c, s in terms if s is not None)
    return _result(loss, stats, arguments)


def plain_pytorch(problem: Problem, dtype: torch.dtype, device: str = "cpu") -> Result:
    """Compute as a user would: products in the inputs' dtype, softmax in float32, autograd. Without LoRA and mask."""
    a = problem.tensors(dtype, device)
    tau = a.get("temperature", 1.0)
    tau = tau[:, None] if isinstance(tau, Tensor) else tau

    def logp(hidden, weight, bias):
        u = (hidden @ weight.T if bias is None else hidden @ weight.T + bias).float()
        if problem.softcap is not None:
            u = problem.softcap * torch.tanh(u / problem.softcap)
        return (u / tau).log_softmax(-1)

    p = logp(a["hidden"], a["weight"], a.get("bias"))
    stats = [p.gather(1, a["target"][:, None])[:, 0], -(p.exp() * p).sum(1), None]
    if problem.with_reference:
        with torch.no_grad():
            q = logp(a["ref_hidden"], a.get("ref_weight", a["weight"]), a.get("ref_bias", a.get("bias")))
        stats[2] = (p.exp() * (p - q)).sum(1)
    loss = sum(
        (c * s).sum() for c, s in zip(problem.upstream().float().to(device), stats, strict=True) if s is not None
    )
    return _result(loss, stats, a)


def _result(loss: Tensor, stats: Any, arguments: dict[str, Any]) -> Result:
    lora = arguments.get("lora")
    variables = {name: arguments[name] for name in ("hidden", "weight", "bias") if name in arguments}
    if lora is not None:
        variables |= {"lora.a": lora.a, "lora.b": lora.b}
    variables = {name: x for name, x in variables.items() if x.requires_grad}
    gradients = torch.autograd.grad(loss, list(variables.values()))
    values = {"loss": loss}
    values |= {name: x for name, x in zip(("logprob", "entropy", "kl"), stats, strict=True) if x is not None}
    values |= {f"d {name}": g for name, g in zip(variables, gradients, strict=True)}
    return Result({name: x.detach().cpu() for name, x in values.items()})
