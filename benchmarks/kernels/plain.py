"""Plain PyTorch without custom kernels (logits in memory, softmax in float32, autograd), also under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.entrant import Entrant, Outcome, Run, Setting
from benchmarks.kernels.problem import Problem
from benchmarks.measure import SkippedError

RECOMPILE_LIMIT = 256


def entrants() -> list[Entrant]:
    """Return plain PyTorch, eager and compiled."""
    return [
        Entrant("naive", "PyTorch, naive", _prepare),
        Entrant("naive-token", "PyTorch, naive, token only", _prepare_token),
        Entrant("compile", "PyTorch, torch.compile", _prepare_compiled),
    ]


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T  # (N, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _compute(
    operator: str,
    softcap: float | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    alpha: Tensor,
    kappa: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the fields of an `Outcome`; the arguments are tensors of a `Problem`, as the compiler needs them."""
    logp = _logits(hidden, weight, softcap).log_softmax(-1)
    if operator == "linear_sample":
        p = logp.exp()
        token = torch.multinomial(p, 1)
        return token.squeeze(-1), logp.gather(-1, token).squeeze(-1), -(p * logp).sum(-1)
    logprob = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if operator == "linear_logprob":
        return (logprob,)
    loss = (alpha * logprob).sum()
    if kappa is None or ref_hidden is None:
        return (loss,)
    with torch.no_grad():
        logq = _logits(ref_hidden, weight if ref_weight is None else ref_weight, softcap).log_softmax(-1)
    return (loss + (kappa * (logp.exp() * (logp - logq)).sum(-1)).sum(),)


def _prepare(case: Case, setting: Setting) -> Run:
    return _run(functools.partial(_compute, case.operator, setting.shape.softcap), _quantity(case))


def _prepare_token(case: Case, setting: Setting) -> Run:
    if case.operator != "linear_sample":
        raise SkippedError("samples only")

    def sample(problem: Problem) -> Outcome:
        p = _logits(problem.hidden, problem.weight, problem.softcap).softmax(-1)
        return Outcome(torch.multinomial(p, 1).squeeze(-1))

    return Run(sample, "token only")


def _prepare_compiled(case: Case, setting: Setting) -> Run:
    compiled = _compiled(case.name, case.operator, setting.shape.softcap)
    return _run(compiled, f"{_quantity(case)}; dynamic=True")


def _run(compute: Callable[..., tuple[Tensor, ...]], quantity: str) -> Run:
    def forward(problem: Problem) -> Outcome:
        inputs = (problem.hidden, problem.weight, problem.target, problem.alpha, problem.kappa)
        return Outcome(*compute(*inputs, problem.ref_hidden, problem.ref_weight))

    return Run(forward, quantity)


def _quantity(case: Case) -> str:
    if case.operator == "linear_sample":
        return "token, log-probability, entropy"
    # With the logits in memory, the backward pass does not recompute them: one product less than that case's floor.
    return "logits kept: 3 products" if case.products.count("logits") > 1 else "logits kept"


@functools.cache
def _compiled(case: str, operator: str, softcap: float | None) -> Callable[..., Any]:
    """Compile once for all sizes of a case: static shapes would cause a compilation for each number of rows.

    To the compiler all cases are the same code, which by default it compiles at most eight times.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(functools.partial(_compute, operator, softcap), dynamic=True)
