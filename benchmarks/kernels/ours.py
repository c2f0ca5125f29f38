"""This project's operators, one entrant per backend."""

from __future__ import annotations

import functools

from torch import Tensor

from alignpro_kernels import backends, linear_logprob, linear_sample, policy_loss
from benchmarks.kernels.cases import Case
from benchmarks.kernels.entrant import Entrant, Outcome, Run, Setting
from benchmarks.kernels.problem import Problem
from benchmarks.measure import SkippedError


def entrants() -> list[Entrant]:
    """Return every backend of this build, including those that cannot run here."""
    return [
        Entrant(f"ours-{name}", f"Align-Pro {name}", functools.partial(prepare, name, reason))
        for name, reason in backends().items()
    ]


def prepare(backend: str, reason: str | None, case: Case, setting: Setting) -> Run:
    """Prepare the operator of a case on one backend; skip it if there is a ``reason`` why the backend cannot run."""
    if reason is not None:
        raise SkippedError(reason)
    if case.operator == "linear_sample":
        return Run(functools.partial(_sample, backend), "token, log-probability, entropy", seeded=True)
    if case.operator == "linear_logprob":
        return Run(functools.partial(_logprob, backend), "log-probability")
    return Run(functools.partial(_policy, backend), "loss" + (", exact KL in the same pass" if case.kl else ""))


def _policy(backend: str, problem: Problem) -> Outcome:
    def coefficients(
        logprob: Tensor, entropy: Tensor | None, kl: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        alpha = problem.alpha[rows]
        loss = alpha * logprob
        if kl is None or problem.kappa is None:
            return loss, alpha, None, None
        kappa = problem.kappa[rows]
        return loss + kappa * kl, alpha, None, kappa

    return Outcome(policy_loss(**problem.arguments, coefficients=coefficients, backend=backend).loss)


def _logprob(backend: str, problem: Problem) -> Outcome:
    stats = linear_logprob(problem.hidden, problem.weight, problem.target, softcap=problem.softcap, backend=backend)
    return Outcome(stats.logprob)


def _sample(backend: str, problem: Problem) -> Outcome:
    return Outcome(
        *linear_sample(problem.hidden, problem.weight, seeds=problem.seeds, softcap=problem.softcap, backend=backend)
    )
