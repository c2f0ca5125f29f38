"""Plain PyTorch without custom kernels (logits in memory, softmax in float32, autograd), also under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.entrant import Entrant, Outcome, Run, Setting, Skip
from benchmarks.kernels.problem import Problem

RECOMPILE_LIMIT = 256


def entrants() -> list[Entrant]:
    """Return plain PyTorch, eager and compiled."""
    return [
        Entrant("naive", "PyTorch, naive", _prepare),
        Entrant("naive-token", "PyTorch, naive, token only", _prepare_token),
        Entrant("compile", "PyTorch, torch.compile", _prepare_compiled),
    ]


def _log_softmax(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = _wide(hidden @ weight.T)  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)


def _logprob(hidden: Tensor, weight: Tensor, target: Tensor, *, softcap: float | None) -> Tensor:
    return _log_softmax(hidden, weight, softcap).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    alpha: Tensor,
    kappa: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    *,
    softcap: float | None,
) -> Tensor:
    logp = _log_softmax(hidden, weight, softcap)
    loss = (alpha * logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)).sum()
    if kappa is None or ref_hidden is None or ref_weight is None:
        return loss
    with torch.no_grad():
        logq = _log_softmax(ref_hidden, ref_weight, softcap)
    return loss + (kappa * (logp.exp() * (logp - logq)).sum(-1)).sum()


def _sample(hidden: Tensor, weight: Tensor, *, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        logp = _log_softmax(hidden, weight, softcap)
        p = logp.exp()
        token = torch.multinomial(p, 1)
        return token.squeeze(-1), logp.gather(-1, token).squeeze(-1), -(p * logp).sum(-1)


def _token(hidden: Tensor, weight: Tensor, *, softcap: float | None) -> Tensor:
    with torch.no_grad():
        logits = _wide(hidden @ weight.T)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def _prepare(case: Case, setting: Setting) -> Run | Skip:
    run = _forward(case, lambda function: functools.partial(function, softcap=setting.shape.softcap))
    return Run(run, _quantity(case))


def _prepare_token(case: Case, setting: Setting) -> Run | Skip:
    if case.operator != "linear_sample":
        return Skip("samples only")
    return Run(lambda problem: Outcome(_token(problem.hidden, problem.weight, softcap=problem.softcap)), "token only")


def _prepare_compiled(case: Case, setting: Setting) -> Run | Skip:
    run = _forward(case, lambda function: _compiled(function, case.name, setting.shape.softcap))
    return Run(run, f"{_quantity(case)}; dynamic=True")


def _quantity(case: Case) -> str:
    if case.operator == "linear_sample":
        return "token, log-probability, entropy"
    # With the logits in memory, the backward pass does not recompute them: one product less than that case's floor.
    return "logits kept: 3 products" if case.products.count("logits") > 1 else "logits kept"


def _forward(case: Case, bind: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[Problem], Outcome]:
    """Return the case's function of a problem, with its soft-cap bound by ``bind``, which may also compile it."""
    if case.operator == "linear_sample":
        sample = bind(_sample)
        return lambda problem: Outcome(*sample(problem.hidden, problem.weight))
    if case.operator == "linear_logprob":
        logprob = bind(_logprob)
        return lambda problem: Outcome(logprob(problem.hidden, problem.weight, problem.target))
    loss = bind(_loss)

    def policy(problem: Problem) -> Outcome:
        ref_weight = problem.weight.detach() if problem.ref_weight is None else problem.ref_weight
        tensors = (problem.hidden, problem.weight, problem.target, problem.alpha, problem.kappa)
        return Outcome(loss(*tensors, problem.ref_hidden, ref_weight if problem.ref_hidden is not None else None))

    return policy


@functools.cache
def _compiled(function: Callable[..., Any], case: str, softcap: float | None) -> Callable[..., Any]:
    """Compile once for all sizes of a case: static shapes would cause a compilation for each number of rows.

    To the compiler all cases are the same code, which by default it compiles at most eight times.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(functools.partial(function, softcap=softcap), dynamic=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
