"""Right before fast: every entrant against the reference in float64."""

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
# ‖found − expected‖ / ‖expected‖ beyond which a result is called wrong. Not a test of precision (the deviations are in
# the results): plain bfloat16 PyTorch, its logits rounded, comes to about a hundredth.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
WIDE_BYTES = 3 << 30  # a float64 head that takes more than this on a CPU: the reference runs in float32
MISMATCHES = 0.02  # share of sampled tokens that may differ from the reference's at the same seeds: near ties
SIGMAS = 5.0  # a sampler whose mean log-probability is so far from the distribution's is wrong


@dataclass(frozen=True)
class Expected:
    """What the reference finds: gradients on a sample of R rows, values on all."""

    rows: Tensor  # (R,) int64
    problem: Problem  # of those rows
    value: Tensor  # loss () or log-probabilities (R,)
    gradients: tuple[Tensor, ...]
    terms: Tensor  # (N,): each row's share of the loss, or its log-probability
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpectedSample:
    """What the reference samples on R of the rows."""

    rows: Tensor  # (R,) int64
    problem: Problem  # of those rows
    wide: Problem  # the same in `dtype`
    token: Tensor  # (R,) int64
    dtype: torch.dtype


@dataclass(frozen=True)
class Deviation:
    """How far an entrant is off."""

    values: dict[str, float]
    wrong: str | None
    """What is wrong, if anything."""


def gradients(case: Case, problem: Problem, outcome: Outcome) -> tuple[Tensor, ...]:
    """The backward pass: of the loss, or of the log-probabilities with the coefficients as their gradient."""
    if not case.backward:
        return ()
    upstream = problem.alpha.to(outcome.value.dtype) if outcome.value.ndim else None
    return torch.autograd.grad(outcome.value, problem.wanted, upstream)


def expect(case: Case, problem: Problem, setting: Setting) -> Expected | ExpectedSample:
    """What a right entrant finds."""
    dtype = _wide_dtype(problem)
    if case.operator == "linear_sample":
        rows = _spaced(problem, SAMPLE_ROWS)
        wide = problem.select(rows).to(dtype)
        sample = linear_sample(wide.hidden, wide.weight, seeds=wide.seeds, softcap=wide.softcap, backend="reference")
        return ExpectedSample(rows, problem.select(rows), wide, sample.token, dtype)
    rows = _spaced(problem, ROWS)
    run = ours.prepare("reference", None, case, setting)
    assert isinstance(run, Run)
    wide = problem.select(rows).to(dtype)
    outcome = run.forward(wide)
    grads = gradients(case, wide, outcome)
    return Expected(rows, problem.select(rows), outcome.value.detach(), grads, _terms(case, problem), dtype)


def check(case: Case, run: Run, problem: Problem, expected: Expected | ExpectedSample) -> Deviation:
    """Run an entrant on the chosen rows and compare.

    Raises:
        Exception: Whatever the entrant raises.
    """
    tolerance = TOLERANCE[problem.hidden.dtype]
    if isinstance(expected, ExpectedSample):
        return _check_sample(run, expected, tolerance)
    outcome = run.forward(expected.problem)
    grads = gradients(case, expected.problem, outcome)
    share = expected.terms[expected.rows] * (problem.rows / expected.rows.numel())
    found = {"value": _value_deviation(outcome.value, expected.value, share)}
    for name, got, want in zip(("d_hidden", "d_weight"), grads, expected.gradients, strict=False):
        found[name] = _relative(got, want)
    return Deviation(found, _verdict(found, tolerance))


def check_at_size(
    case: Case, problem: Problem, outcome: Outcome, grads: tuple[Tensor, ...], expected: Expected
) -> Deviation:
    """Compare a run on all rows: its values, and the chosen rows of its gradient in the hidden states."""
    terms = expected.terms
    want = terms if case.operator == "linear_logprob" else terms.sum()
    found = {"value_at_size": _value_deviation(outcome.value, want, terms)}
    if grads:
        scale = problem.rows / expected.rows.numel()  # the sample is normalised by its own number of rows
        found["d_hidden_at_size"] = _relative(grads[0][expected.rows].double() * scale, expected.gradients[0])
    return Deviation(found, _verdict(found, TOLERANCE[problem.hidden.dtype]))


def _check_sample(run: Run, expected: ExpectedSample, tolerance: float) -> Deviation:
    """A sampler's own figures for its tokens; its tokens, where it takes seeds; and on many rows, its distribution."""
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
    wrong = _verdict(found, tolerance)
    if run.seeded:
        found["tokens_that_differ"] = float((outcome.value != expected.token).double().mean())
        if found["tokens_that_differ"] > MISMATCHES:
            wrong = f"{found['tokens_that_differ']:.0%} of the tokens are not the reference's"
    # E log p(token) = −H: the mean of log p + H over the rows is zero but for chance.
    surprise = (stats.logprob + stats.entropy).double()
    if len(surprise) == SAMPLE_ROWS:
        found["sigmas"] = float(surprise.mean() / surprise.std() * math.sqrt(len(surprise)))
        if not abs(found["sigmas"]) < SIGMAS:
            wrong = f"the tokens' mean log-probability is {found['sigmas']:.1f} sigma off the distribution's"
    return Deviation(found, wrong)


def _terms(case: Case, problem: Problem) -> Tensor:
    """Every row's share of the loss, or its log-probability: by the reference in float32, some rows at a time."""
    parts = []
    chunk = 1024 if problem.hidden.is_cuda else 128
    with torch.no_grad():
        for start in range(0, problem.rows, chunk):
            rows = slice(start, start + chunk)
            stats = linear_logprob(
                problem.hidden[rows],
                problem.weight,
                problem.target[rows],
                softcap=problem.softcap,
                ref_hidden=None if problem.ref_hidden is None else problem.ref_hidden[rows],
                ref_weight=problem.ref_weight,
                backend="reference",
            )
            terms = stats.logprob
            if case.operator == "policy_loss":
                terms = problem.alpha[rows] * terms
            if stats.kl is not None and problem.kappa is not None:
                terms = terms + problem.kappa[rows] * stats.kl
            parts.append(terms.double())
    return torch.cat(parts)


def _value_deviation(found: Tensor, expected: Tensor, terms: Tensor) -> float:
    """Of log-probabilities as a vector; of a loss, whose terms may cancel, in units of Σ |terms|."""
    if found.ndim:
        return _relative(found, expected)
    return float((found.detach().double() - expected.double()).abs() / terms.abs().sum())


def _relative(found: Tensor, expected: Tensor, block: int = 4096) -> float:
    """‖found − expected‖ / ‖expected‖ in float64, a block of rows at a time: a head's gradient is large."""
    if found.shape != expected.shape:
        return math.inf
    off = size = 0.0
    for got, want in zip(found.detach().split(block), expected.detach().split(block), strict=True):
        want = want.double()
        off += float((got.double() - want).square().sum())
        size += float(want.square().sum())
    return math.sqrt(off / size) if size else math.sqrt(off)


def _verdict(found: dict[str, float], tolerance: float) -> str | None:
    """The first deviation that is too large; NaN is."""
    off = [f"{name} is off by {value:.1e}" for name, value in found.items() if not value <= tolerance]
    return off[0] if off else None


def _spaced(problem: Problem, most: int) -> Tensor:
    """Evenly spaced rows, the first and the last among them."""
    count = min(most, problem.rows)
    return torch.linspace(0, problem.rows - 1, count, device=problem.hidden.device, dtype=torch.float64).round().long()


def _wide_dtype(problem: Problem) -> torch.dtype:
    wide = problem.weight.is_cuda or problem.weight.numel() * 8 <= WIDE_BYTES
    return torch.float64 if wide else torch.float32
