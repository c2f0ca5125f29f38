"""What the verdicts of a judge on pairs of responses say, and whether they say anything.

Every pair is judged in both orders. Of N pairs that have both verdicts, a pair is won or lost if both orders say so, tied if
both say that neither is better, and a disagreement if they differ. The rate counts a preference as 1 and a tie as ½ in each
order.

A judge that does not look at the responses draws its verdicts from how often it says A, B and tie. Its two verdicts on a pair
then name the same response by chance in 2 a b + t² of the pairs, where a, b and t are the shares of its verdicts. Whether a
judge is more consistent than that does not depend on which response is better, so one that rightly prefers one side nearly
always is not taken for one that guesses, as Cohen's κ of both orders would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from alignpro.theory.statistics.binary import korn_graubard_p_value
from alignpro.theory.statistics.clusters import Clusters
from alignpro.theory.statistics.estimates import Estimate, NotEstimable, finite_or_none
from alignpro.theory.statistics.intervals import mean_estimate
from alignpro.theory.statistics.length_control import LengthControlled, length_controlled
from alignpro.theory.statistics.values import FloatArray, Values, are_binary, finite

LEAST_AGREEMENT = 0.2
"""How much of the way from chance to always the consistency must go: below lies what Landis & Koch (1977) call slight."""
POSITION = (0.4, 0.6)
"""Share of preferences for the response that comes first outside which a judge goes by position."""
LENGTH = (0.1, 0.9)
"""Share of decided pairs that go to the longer response outside which a judge cannot be told from one that measures length."""
MOST_ERRORS = 0.5
"""Share of pairs without a verdict above which the others are not taken for all."""

Diagnosis = Literal["usable", "unreadable", "ties", "position", "chance", "too few", "length"]


@dataclass(frozen=True)
class JudgedPairs:
    """The verdicts of one judge on pairs of responses, ours and another's, in both orders."""

    first: FloatArray
    """(N,) 1 if ours is preferred where it comes first, 0 if the other is, ½ for a tie."""
    second: FloatArray
    """(N,) likewise where ours comes second."""
    longer: FloatArray
    """(N,) by how many characters ours is longer."""
    clusters: Clusters
    """The pairs that belong together, such as those of one prompt."""
    errors: int = 0
    """Pairs beside these N that have no verdict in one of the orders."""

    @property
    def preferred(self) -> FloatArray:
        """(N,) the share of both orders in which ours is preferred, a tie counting half."""
        shares: FloatArray = (self.first + self.second) / 2
        return shares

    @property
    def consistent(self) -> FloatArray:
        """(N,) 1 where both orders say the same, else 0."""
        return (self.first == self.second).astype(np.float64)


@dataclass(frozen=True)
class JudgementStatistics:
    """What a judge says of two arms. Where there is no judgement, the rates are those of a judge that cannot be used."""

    pairs: int
    """With a verdict in both orders."""
    errors: int
    wins: int
    losses: int
    ties: int
    disagreements: int
    win_rate: Estimate
    """Its p-value is that of a rate of one half."""
    length_controlled: LengthControlled
    consistency: Estimate
    """Share of pairs whose two orders say the same."""
    decided_consistency: float
    """Likewise of the pairs in which neither order says tie; NaN without any."""
    chance: float
    """The consistency of verdicts that are drawn without looking."""
    first_preferred: Estimate
    """How often the response that comes first is preferred, a tie counting half; ½ without a bias."""
    longer_preferred: Estimate
    """Share of the decided pairs of unequal length in which the longer response wins."""
    diagnosis: Diagnosis
    reason: str
    """Why there is no judgement; empty if there is one."""

    def as_dict(self) -> dict[str, Any]:
        """The content for JSON."""
        counts = ("pairs", "errors", "wins", "losses", "ties", "disagreements")
        return {
            **{name: getattr(self, name) for name in counts},
            "win_rate": self.win_rate.as_dict(),
            "length_controlled": self.length_controlled.rate.as_dict(),
            "length_slope": finite_or_none(self.length_controlled.slope),
            "consistency": self.consistency.as_dict(),
            "decided_consistency": finite_or_none(self.decided_consistency),
            "chance_consistency": finite_or_none(self.chance),
            "first_preferred": self.first_preferred.as_dict(),
            "longer_preferred": self.longer_preferred.as_dict(),
            "diagnosis": self.diagnosis,
            "no_judgement": self.reason or None,
        }


def judgement_statistics(judged: JudgedPairs) -> JudgementStatistics:
    """Rates, biases and the diagnosis of a judge.

    There is a judgement if the lower end of the 95 % interval of the consistency is above c + 0.2 (1 − c), where c is the
    consistency by chance, that of the pairs of which neither order says tie is above theirs, since ties may agree for a reason
    of their own, and the judge does not go by length alone. Otherwise the diagnosis is the first of these that holds:

    ========== ============================================================================================================
    unreadable more than half of the pairs have no verdict
    ties       every verdict is a tie
    position   the interval of preferences for the response that comes first lies outside [0.4, 0.6]
    too few    the consistency itself is above the threshold, its interval is not
    chance     none of these
    length     consistent, but the interval of decided pairs that go to the longer response lies outside [0.1, 0.9]
    ========== ============================================================================================================

    Raises:
        ValueError: The arrays have different lengths, or hold other values than 0, ½ and 1.
    """
    _check(judged)
    count = len(judged.first)
    if count == 0:
        return _nothing(judged.errors)
    preferred, consistent = judged.preferred, judged.consistent
    decided = consistent * (judged.first != 0.5)
    without_ties = _without_ties(judged).consistent
    consistency = mean_estimate(consistent, judged.clusters)
    chance = _consistency_by_chance(judged)
    first = _first_preferred(judged)
    longer = _longer_preferred(judged, decided.astype(bool))
    diagnosis, reason = _diagnose(judged, consistency, chance, first, longer)
    return JudgementStatistics(
        pairs=count,
        errors=judged.errors,
        wins=int((decided * judged.first).sum()),
        losses=int((decided * (1 - judged.first)).sum()),
        ties=int((consistent * (judged.first == 0.5)).sum()),
        disagreements=int((1 - consistent).sum()),
        win_rate=_against_half(preferred, judged.clusters),
        length_controlled=length_controlled(preferred, judged.longer, judged.clusters),
        consistency=consistency,
        decided_consistency=float(without_ties.mean()) if len(without_ties) else math.nan,
        chance=chance,
        first_preferred=first,
        longer_preferred=longer,
        diagnosis=diagnosis,
        reason=reason,
    )


def cohen_kappa(a: Values, b: Values, clusters: Clusters) -> Estimate:
    """Cohen's (1960) κ of two judges on the same pairs: (o − e)/(1 − e), with o observed agreement and e that by chance.

    With p_k and q_k the shares of outcome k that each judge gives, e = Σ p_k q_k. κ is linearised for its interval: pair i
    contributes (d_i − o)/(1 − e) − (1 − o)/(1 − e)² · Σ_k [q_k (a_ik − p_k) + p_k (b_ik − q_k)], whose mean over clusters
    has κ's error.

    Args:
        a: (N,) the outcome of each pair by one judge: any numbers, equal ones for equal outcomes.
        b: (N,) by the other.
        clusters: The pairs that belong together.

    Returns:
        The estimate; NaN if both judges give one and the same outcome to every pair, where κ is not defined.

    Raises:
        ValueError: The judges have different numbers of pairs, or none.
    """
    first, second = finite(a), finite(b)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"two judges of the same pairs, got outcomes of shapes {first.shape} and {second.shape}")
    outcomes = np.unique(np.concatenate([first, second]))
    of_a, of_b = (np.equal.outer(each, outcomes).astype(np.float64) for each in (first, second))  # (N, k)
    p, q = of_a.mean(0), of_b.mean(0)
    agree = (first == second).astype(np.float64)
    observed, chance = float(agree.mean()), float(p @ q)
    if chance == 1:
        return Estimate(math.nan, NotEstimable("both judges give one and the same outcome to every pair"))
    kappa = (observed - chance) / (1 - chance)
    drift = (of_a - p) @ q + (of_b - q) @ p
    influence = (agree - observed) / (1 - chance) - (1 - observed) / (1 - chance) ** 2 * drift
    interval = mean_estimate(kappa + influence, clusters, rewards=False).interval
    if isinstance(interval, NotEstimable):
        interval = NotEstimable("both judges agree on every pair") if observed == 1 else interval
    return Estimate(kappa, interval)


def outcomes(judged: JudgedPairs) -> FloatArray:
    """(N,) 1 for a pair that ours wins, −1 for one that it loses, 0 for a tie or a disagreement."""
    sums: FloatArray = np.sign(judged.preferred - 0.5) * judged.consistent
    return sums


def _diagnose(
    judged: JudgedPairs, consistency: Estimate, chance: float, first: Estimate, longer: Estimate
) -> tuple[Diagnosis, str]:
    count, errors = len(judged.first), judged.errors
    if errors > MOST_ERRORS * (count + errors):
        return "unreadable", f"{errors} of {count + errors} pairs have no verdict that can be read in both orders"
    if chance == 1:
        return "ties", f"it says of all {count} pairs that neither response is better"
    threshold = chance + LEAST_AGREEMENT * (1 - chance)
    if not consistency.low > threshold:
        return _inconsistent(f"{count} pairs", consistency, chance, threshold, first)
    decided = _without_ties(judged)
    if len(decided.first):
        certain, by_chance = mean_estimate(decided.consistent, decided.clusters), _consistency_by_chance(decided)
        if not certain.low > by_chance:
            pairs = f"the {len(decided.first)} pairs of which neither order says tie"
            return _inconsistent(pairs, certain, by_chance, by_chance, _first_preferred(decided))
    if longer.low > LENGTH[1] or longer.high < LENGTH[0]:
        which, share = ("longer", longer.value) if longer.value > 0.5 else ("shorter", 1 - longer.value)
        return "length", (
            f"it prefers the {which} response in {share:.0%} of the pairs that it decides, so it cannot be told from one "
            "that measures length"
        )
    return "usable", ""


def _inconsistent(
    pairs: str, consistency: Estimate, chance: float, threshold: float, first: Estimate
) -> tuple[Diagnosis, str]:
    """What a judge is whose verdicts on some pairs are not certain to agree in more than a threshold of them."""
    held = (
        f"both orders agree on {consistency.value:.0%} of {pairs} ({_shown(consistency)}), and verdicts drawn without "
        f"looking would on {chance:.0%}"
    )
    if first.low > POSITION[1] or first.high < POSITION[0] or (first.not_estimable and abs(first.value - 0.5) > 0.1):
        which, share = ("first", first.value) if first.value > 0.5 else ("second", 1 - first.value)
        return "position", f"it prefers whichever response comes {which}, in {share:.0%} of its verdicts: {held}"
    if consistency.value > threshold:
        return "too few", f"there are too few pairs to tell: {held}; more than {threshold:.0%} must be certain"
    return "chance", f"its verdicts change with the order: {held}; more than {threshold:.0%} must be certain"


def _without_ties(judged: JudgedPairs) -> JudgedPairs:
    """The pairs of which neither order says tie."""
    kept = (judged.first != 0.5) & (judged.second != 0.5)
    clusters = Clusters(judged.clusters.numbers[kept].tolist())
    return JudgedPairs(judged.first[kept], judged.second[kept], judged.longer[kept], clusters)


def _first_preferred(judged: JudgedPairs) -> Estimate:
    return mean_estimate((judged.first + 1 - judged.second) / 2, judged.clusters)


def _consistency_by_chance(judged: JudgedPairs) -> float:
    """2 a b + t² of the shares of verdicts A, B and tie over both orders."""
    says_a = float(((judged.first == 1).mean() + (judged.second == 0).mean()) / 2)
    says_b = float(((judged.first == 0).mean() + (judged.second == 1).mean()) / 2)
    tie = float(((judged.first == 0.5).mean() + (judged.second == 0.5).mean()) / 2)
    return 2 * says_a * says_b + tie**2


def _longer_preferred(judged: JudgedPairs, decided: np.ndarray) -> Estimate:
    kept = decided & (judged.longer != 0)
    if not kept.any():
        return Estimate(math.nan, NotEstimable("no decided pair differs in length"))
    won = ((judged.first[kept] == 1) == (judged.longer[kept] > 0)).astype(np.float64)
    return mean_estimate(won, Clusters(judged.clusters.numbers[kept].tolist()))


def _against_half(preferred: FloatArray, clusters: Clusters) -> Estimate:
    """The rate with its interval, and the p-value of a rate of one half: small if and only if the interval excludes it."""
    rate = mean_estimate(preferred, clusters)
    if clusters.count > 1 and are_binary([preferred]):
        return replace(rate, p_value=float(korn_graubard_p_value(preferred, 1, clusters, 0.5)))
    return replace(rate, p_value=mean_estimate(preferred - 0.5, clusters, rewards=False).p_value)


def _check(judged: JudgedPairs) -> None:
    sizes = {len(judged.first), len(judged.second), len(judged.longer), judged.clusters.prompts}
    if len(sizes) > 1:
        raise ValueError(f"both orders, lengths and clusters of the same pairs, got {sorted(sizes)}")
    if not np.isin(np.concatenate([judged.first, judged.second]), (0.0, 0.5, 1.0)).all():
        raise ValueError("a verdict is 1, 0 or, for a tie, ½")


def _nothing(errors: int) -> JudgementStatistics:
    missing = Estimate(math.nan, NotEstimable("no pair has a verdict"))
    return JudgementStatistics(
        *(0, errors, 0, 0, 0, 0),
        win_rate=missing,
        length_controlled=LengthControlled(missing, math.nan),
        consistency=missing,
        decided_consistency=math.nan,
        chance=math.nan,
        first_preferred=missing,
        longer_preferred=missing,
        diagnosis="unreadable",
        reason=f"none of {errors} pairs has a verdict that can be read in both orders",
    )


def _shown(estimate: Estimate) -> str:
    if estimate.not_estimable is not None:
        return f"no interval: {estimate.not_estimable}"
    return f"95 % {estimate.low:.0%} to {estimate.high:.0%}"
