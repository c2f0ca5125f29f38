"""The sentences of the report: names of methods, what a comparison says, how many prompts it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignpro.evaluation.comparison_results import Group, MethodResult
from alignpro.theory.statistics import Estimate, NotEstimable, SampleSize


def size_sentence(needed: SampleSize | NotEstimable, difference: float) -> str:
    """How many prompts it takes to see a difference."""
    if isinstance(needed, NotEstimable):
        return f"prompts to see {difference:g}: not estimable: {needed.reason}"
    return f"to see {difference:g} you need {_prompts(needed.prompts, needed.clusters)}"


def verdict_sentence(groups: Sequence[Group]) -> str:
    """What a comparison says in a sentence or two, of Align-Pro if it takes part, else of the best method."""
    subject = _subject(groups)
    if subject is None:
        return _without_baseline(groups)
    label, results = subject
    parts = [_against(label, results, baseline=True)]
    if any(result.versus_instruction for _, result in results):
        parts.append(_against("It", results, baseline=False))
    shares = [result.gap for _, result in results if result.gap is not None]
    if shares:
        parts.append(_recovered(shares))
    return " ".join(parts)


def _subject(groups: Sequence[Group]) -> tuple[str, list[tuple[Group, MethodResult]]] | None:
    """The method that the verdict is about, with its results that have a baseline."""
    compared = [(group, each) for group in groups for each in group.methods if each.versus_baseline is not None]
    candidates = [pair for pair in compared if pair[1].method != "oracle"] or compared
    if not candidates:
        return None
    named = [pair for pair in candidates if pair[1].method == "align_pro"]
    key = max(named or candidates, key=lambda pair: pair[1].mean.value)[1].method
    results = [pair for pair in candidates if pair[1].method == key]
    return results[0][1].label, results


def _without_baseline(groups: Sequence[Group]) -> str:
    methods = [each for group in groups for each in group.methods]
    if len(methods) == 1:
        return f"{methods[0].label} has a mean reward of {_estimate(methods[0].mean)}; nothing was compared with it."
    return "The target without fine-tuning was not evaluated, so nothing is compared with it."


def _against(label: str, results: list[tuple[Group, MethodResult]], *, baseline: bool) -> str:
    """A sentence on the differences to no fine-tuning, or to the best instruction."""
    pairs = [(group, r.versus_baseline if baseline else r.versus_instruction) for group, r in results]
    known = [(group, versus) for group, versus in pairs if versus is not None]
    other = "no fine-tuning" if baseline else "the best hand-written instruction"
    if len(known) == 1:
        versus = known[0][1]
        if versus.difference.not_estimable is not None:
            return f"{label} differs from {other} by {versus.difference.value:+.3f}: {_estimate(versus.difference)}."
        shown = f"by {abs(versus.difference.value):.3f} ({_interval(versus.difference)}, adjusted p {_p(versus.adjusted_p)})"
        if versus.above:
            return f"{label} is above {other} {shown}."
        if versus.below:
            return f"{label} is below {other} {shown}."
        here = _prompts(known[0][0].prompts, known[0][0].clusters)
        return f"{label} is not told from {other}: {_estimate(versus.difference)}; {versus.needed}, here are {here}."
    tasks = len({group.task for group, _ in known}) == len(known)
    unit = "tasks" if tasks else "tasks and pairs"
    above, below = sum(v.above for _, v in known), sum(v.below for _, v in known)
    sentence = f"{label} is above {other} on {above} of {len(known)} {unit}"
    if below:
        sentence += f" and below on {below}"
    return sentence + (" after correction for all comparisons." if baseline else ".")


def _recovered(shares: Sequence[Estimate]) -> str:
    known = [share.value for share in shares if math.isfinite(share.value)]
    if not known:
        return f"The share of the oracle's gain is not estimable: {shares[0].not_estimable}."
    if len(shares) == 1:
        return f"It recovers {known[0]:.2f} ({_interval(shares[0])}) of the oracle's gain."
    missing = len(shares) - len(known)
    tail = f"; on {missing} it is not estimable" if missing else ""
    return f"It recovers {min(known):.2f} to {max(known):.2f} of the oracle's gain{tail}."


def _prompts(prompts: int, clusters: int) -> str:
    return f"{prompts:,} prompts" if clusters == prompts else f"{prompts:,} prompts in {clusters:,} clusters"


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({_interval(estimate)})"


def _interval(estimate: Estimate) -> str:
    if estimate.not_estimable is not None:
        return f"interval not estimable: {estimate.not_estimable}"
    return f"95 % {estimate.low:.3f} to {estimate.high:.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return "not tested"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
