"""Correctness: every entrant is compared with the reference in float64 before it is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro_kernels import linear_logprob, linear_sample
from benchmarks.kernels import ours
from benchmarks.kernels.cases import Case
from benchmarks.kernels.entrant import Outcome, Run, Setting
from benchmarks.kernels.problem import Problem

ROWS = 32  # of the problem, evenly spaced, on which gradients are compared
SAMPLE_ROWS = 64
# ‖found − expected‖ / ‖expected‖ above which a result counts as wrong. This is not a test of precision (the deviations are
# in the results): plain PyTorch in bfloat16, which rounds the logits, deviates by about 0.01.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
WIDE_BYTES = 3 << 30  # if a float64 head takes more than this on a CPU, the reference runs in float32
MISMATCHES = 0.02  # share of sampled tokens that may differ from the reference's with the same seeds, due to near ties
SIGMAS = 5.0  # largest deviation of a sampler's mean log-probability from the distribution's
LIMITS = {"tokens_that_differ": MISMATCHES, "sigmas": SIGMAS}  # of the deviations that are not relative


@dataclass(frozen=True)
class Expected:
    """The results of the reference: gradients on a sample of R rows, values on all rows."""

    rows: Tensor  # (R,) int64
    problem: Problem  # restricted to those rows
    value: Tensor  # loss () or log-probabilities (R,)
    gradients: tuple[Tensor, ...]
    terms: Tensor  # (N,): each row's share of the loss, or its log-probability
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpectedSample:
    """The samples of the reference on R of the rows."""

    rows: Tensor  # (R,) int64
    problem: Problem  # restricted to those rows
    wide: Problem  # the same in `dtype`
    token: Tensor  # (R,) int64
    dtype: torch.dtype


def gradients(case: Case, problem: Problem, outcome: Outcome) -> tuple[Tensor, ...]:
    """Run the backward pass of the loss, or of the log-probabilities with the coefficients as their gradient."""
    if not case.backward:
        return ()
    upstream = problem.alpha.to(outcome.value.dtype) if outcome.value.ndim else None
    return torch.autograd.grad(outcome.value, problem.wanted, upstream)


def expect(case: Case, problem: Problem, setting: Setting) -> Expected | ExpectedSample:
    """Compute the expected results with the reference."""
    dtype = _wide_dtype(problem)
    if case.operator == "linear_sample":
        rows = _spaced(problem, SAMPLE_ROWS)
        wide = problem.select(rows).to(dtype)
        sample = linear_sample(wide.hidden, wide.weight, seeds=wide.seeds, softcap=wide.softcap, backend="reference")
        return ExpectedSample(rows, problem.select(rows), wide, sample.token, dtype)
    rows = _spaced(problem, ROWS)
    run = ours.prepare("reference", None, case, setting)
    wide = problem.select(rows).to(dtype)
    outcome = run.forward(wide)
    grads = gradients(case, wide, outcome)
    return Expected(rows, problem.select(rows), outcome.value.detach(), grads, _terms(case, problem), dtype)


def check(case: Case, run: Run, problem: Problem, expected: Expected | ExpectedSample) -> dict[str, float]:
    """Run an entrant on the chosen rows and return its deviations from the reference.

    Raises:
        Exception: Whatever the entrant raises.
    """
    if isinstance(expected, ExpectedSample):
        return _check_sample(run, expected)
    outcome = run.forward(expected.problem)
    grads = gradients(case, expected.problem, outcome)
    share = expected.terms[expected.rows] * (problem.rows / expected.rows.numel())
    found = {"value": _value_deviation(outcome.value, expected.value, share)}
    for name, got, want in zip(("d_hidden", "d_weight"), grads, expected.gradients, strict=False):
        found[name] = _relative(got, want)
    return found


def check_at_size(
    case: Case, problem: Problem, outcome: Outcome, grads: tuple[Tensor, ...], expected: Expected
) -> dict[str, float]:
    """Compare a run on all rows: its values, and the chosen rows of the gradient of the hidden states."""
    terms = expected.terms
    want = terms if case.operator == "linear_logprob" else terms.sum()
    found = {"value_at_size": _value_deviation(outcome.value, want, terms)}
    if grads:
        scale = problem.rows / expected.rows.numel()  # the sample is normalised by its own number of rows
        found["d_hidden_at_size"] = _relative(grads[0][expected.rows].double() * scale, expected.gradients[0])
    return found


def describe_error(deviations: dict[str, float], dtype: torch.dtype) -> str | None:
    """Describe the first deviation that is too large or NaN, if any; ``dtype`` is that of the entrant."""
    for name, value in deviations.items():
        if not abs(value) <= LIMITS.get(name, TOLERANCE[dtype]):
            return f"{name} is off by {value:.1e}"
    return None


def _check_sample(run: Run, expected: ExpectedSample) -> dict[str, float]:
    """Check a sampler's statistics of its tokens, its tokens if it takes seeds, and, with enough rows, its distribution."""
    outcome = run.forward(expected.problem)
    wide = expected.wide
    stats = linear_logprob(
        wide.hidden, wide.weight, outcome.value, softcap=wide.softcap, entropy=True, backend="reference"
    )
    assert stats.entropy is not None
    found: dict[str, float] = {}
    if outcome.logprob is not None:
        found["logprob"] = _relative(outcome.logprob, stats.logprob)
    if outcome.entropy is not None:
        found["entropy"] = _relative(outcome.entropy, stats.entropy)
    if run.seeded:
        found["tokens_that_differ"] = float((outcome.value != expected.token).double().mean())
    # E log p(token) = −H, so the expected mean of log p + H over the rows is zero.
    surprise = (stats.logprob + stats.entropy).double()
    if len(surprise) == SAMPLE_ROWS:
        found["sigmas"] = float(surprise.mean() / surprise.std() * math.sqrt(len(surprise)))
    return found


def _terms(case: Case, problem: Problem) -> Tensor:
    """Compute every row's share of the loss, or its log-probability, with the reference in float32, in chunks of rows."""
    parts = []
    chunk = 1024 if problem.hidden.is_cuda else 128
    with torch.no_grad():
        for rows in torch.arange(problem.rows, device=problem.hidden.device).split(chunk):
            stats = linear_logprob(**problem.select(rows).arguments, backend="reference")
            terms = stats.logprob
            if case.operator == "policy_loss":
                terms = problem.alpha[rows] * terms
            if stats.kl is not None and problem.kappa is not None:
                terms = terms + problem.kappa[rows] * stats.kl
            parts.append(terms.double())
    return torch.cat(parts)


def _value_deviation(found: Tensor, expected: Tensor, terms: Tensor) -> float:
    """Return the relative deviation of log-probabilities, or that of a loss in units of Σ |terms|, which may cancel."""
    if found.ndim:
        return _relative(found, expected)
    return float((found.detach().double() - expected.double()).abs() / terms.abs().sum())


def _relative(found: Tensor, expected: Tensor, block: int = 4096) -> float:
    """Return ‖found − expected‖ / ‖expected‖ in float64, in blocks of rows, since a head's gradient is large."""
    if found.shape != expected.shape:
        return math.inf
    off = size = 0.0
    for got, want in zip(found.detach().split(block), expected.detach().split(block), strict=True):
        want = want.double()
        off += float((got.double() - want).square().sum())
        size += float(want.square().sum())
    return math.sqrt(off / size) if size else math.sqrt(off)


def _spaced(problem: Problem, limit: int) -> Tensor:
    """Return evenly spaced rows, including the first and the last."""
    count = min(limit, problem.rows)
    return torch.linspace(0, problem.rows - 1, count, device=problem.hidden.device, dtype=torch.float64).round().long()


def _wide_dtype(problem: Problem) -> torch.dtype:
    wide = problem.weight.is_cuda or problem.weight.numel() * 8 <= WIDE_BYTES
    return torch.float64 if wide else torch.float32
