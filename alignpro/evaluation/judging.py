"""What judges say of the arms of an evaluation, from the responses that it recorded: nothing is sampled again.

samples.jsonl, rewards.json ──► pairs of responses ──► verdicts in both orders ──► rates, biases, diagnosis, agreement
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from alignpro.config import EngineConfig, JudgingConfig
from alignpro.data import Message, Prompt
from alignpro.errors import DataError
from alignpro.evaluation.judges import Judge, Pair, PairVerdict, judge_pairs, open_judge
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.results import SampleRow
from alignpro.evaluation.rewards_file import EvaluationRewards
from alignpro.rewards.rubric import Rubric
from alignpro.rewards.servers import Session
from alignpro.theory.statistics import (
    Clusters,
    Estimate,
    JudgedPairs,
    JudgementStatistics,
    NotEstimable,
    cohen_kappa,
    finite_or_none,
    holm,
    judgement_statistics,
    outcomes,
)

logger = logging.getLogger(__name__)

_OURS_FIRST = {"A": 1.0, "tie": 0.5, "B": 0.0}
_OURS_SECOND = {"B": 1.0, "tie": 0.5, "A": 0.0}


@dataclass(frozen=True)
class ArmPairs:
    """The pairs of one comparison."""

    arm: str
    against: str
    pairs: Sequence[Pair]
    """Those whose responses differ."""
    identical: int
    """Pairs beside these whose responses are equal: they are not asked about, since any preference would be one of place."""


@dataclass(frozen=True)
class ArmJudgement:
    """What one judge says of one arm against another."""

    judge: str
    arm: str
    against: str
    identical: int
    statistics: JudgementStatistics
    first_problem: str = ""
    """Why the first pair without a verdict has none."""
    adjusted_p: float | None = None
    """The p-value of a rate of one half, adjusted for the judge's number of comparisons (Holm)."""

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "judge": self.judge,
            "arm": self.arm,
            "against": self.against,
            "identical": self.identical,
            **self.statistics.as_dict(),
            "first_problem": self.first_problem or None,
            "adjusted_p": finite_or_none(self.adjusted_p),
        }


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the pairs of one comparison that both have a verdict on."""

    arm: str
    against: str
    pairs: int
    kappa: Estimate

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {"arm": self.arm, "against": self.against, "pairs": self.pairs, "kappa": self.kappa.as_dict()}


@dataclass(frozen=True)
class Judgement:
    """What judges say of the arms of an evaluation."""

    judges: Mapping[str, str]
    """Name → the model that answered."""
    rubric: str
    """The version of what they were asked."""
    comparisons: Sequence[ArmJudgement]
    """Those of the first judge come first."""
    agreements: Sequence[Agreement] = ()
    rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """The verdicts, pair by pair, as judgements.jsonl has them."""

    @property
    def verdict(self) -> str:
        """What the first judge says in a sentence: of Align-Pro if it takes part, else of the first comparison."""
        named = [each for each in self.comparisons if each.arm == "align_pro"]
        return judgement_sentence((named or list(self.comparisons))[0])

    @property
    def sentences(self) -> list[str]:
        """What each judge says of each arm, and how far two judges agree."""
        agreed = [
            f"On {method_label(each.arm)} and {method_label(each.against)}, both judges agree with Cohen's κ of "
            f"{each.kappa.value:.2f} on {each.pairs} pairs."
            for each in self.agreements
        ]
        return [*(judgement_sentence(each) for each in self.comparisons), *agreed]

    def as_dict(self) -> dict[str, Any]:
        """The content for summary.json."""
        return {
            "judges": dict(self.judges),
            "rubric": self.rubric,
            "verdict": self.verdict,
            "comparisons": [each.as_dict() for each in self.comparisons],
            "agreements": [each.as_dict() for each in self.agreements],
        }


def judge_arms(
    judging: JudgingConfig,
    rows: Sequence[SampleRow],
    rewards: EvaluationRewards,
    session: Session,
    engine: EngineConfig,
    *,
    where: str,
    opened: dict[str, Judge] | None = None,
) -> Judgement:
    """Let judges compare the arms of an evaluation.

    Args:
        judging: The judges, and what is compared.
        rows: The content of samples.jsonl.
        rewards: The content of rewards.json, which has the prompts' ids and clusters.
        session: Connects to servers.
        engine: Of judges in this process.
        where: The evaluation's directory, for messages.
        opened: Judges that are loaded already, by name; those that this call loads are added.

    Raises:
        ConfigError: The rubric cannot be used.
        DataError: The samples do not fit the rewards, or an arm to compare with is not among them.
        EndpointError: A server cannot be used, or another model began to answer.
        BudgetError: An answer could exceed the budget; those that came are in the ledger.
        ModelError: A judge's model cannot be used.
    """
    rubric = judging_rubric(judging)
    comparisons = arm_pairs(judging, rows, rewards, where)
    loaded = {} if opened is None else opened
    judged: list[ArmJudgement] = []
    verdicts: dict[str, list[list[PairVerdict]]] = {}
    models: dict[str, str] = {}
    for config in judging.judges:
        name = config.label
        if name not in loaded:
            loaded[name] = open_judge(config, judging, engine, session)
        judge = loaded[name]
        logger.info("judge %s: %d pairs in both orders", name, sum(len(each.pairs) for each in comparisons))
        verdicts[name] = [judge_pairs(judge, rubric, judging, each.pairs) for each in comparisons]
        models[name] = judge.model
        judged += _adjusted([_of_arm(name, *each) for each in zip(comparisons, verdicts[name], strict=True)])
    both = list(verdicts.values())
    agreements = [_agreement(*each) for each in zip(comparisons, *both, strict=True)] if len(both) == 2 else []
    return Judgement(models, rubric.version, judged, agreements, _rows(comparisons, verdicts))


def judging_rubric(judging: JudgingConfig) -> Rubric:
    """The rubric of a comparison.

    Raises:
        ConfigError: It cannot be used.
    """
    return Rubric("pairwise", judging.rubric, "judge", criteria=judging.criteria)


def arm_pairs(
    judging: JudgingConfig, rows: Sequence[SampleRow], rewards: EvaluationRewards, where: str
) -> list[ArmPairs]:
    """The pairs of all comparisons: the n-th responses of two arms to a prompt are one.

    Raises:
        DataError: The samples do not fit the rewards, or an arm to compare with is not among them.
    """
    responses, prompts = _responses(rows, rewards, where)
    if missing := [arm for arm in judging.against if arm not in rewards.arms]:
        raise DataError(
            f"{where}: has no arm {missing[0]} to compare with (arms: {', '.join(rewards.arms)}): name others as judge.against"
        )
    wanted = [
        (arm, other)
        for arm in rewards.arms
        for other in judging.against
        if arm != other and not (arm in judging.against and judging.against.index(arm) < judging.against.index(other))
    ]
    if not wanted:
        raise DataError(
            f"{where}: has the arm {next(iter(rewards.arms))} alone, which is compared with nothing (a cell of an experiment is "
            "of one method): judge an evaluation of several arms"
        )
    comparisons = []
    for arm, other in wanted:
        drawn = [
            Pair(prompt, ours, theirs, cluster)
            for prompt, cluster, of_arm in zip(prompts, rewards.clusters, responses, strict=True)
            for ours, theirs in list(zip(of_arm[arm], of_arm[other], strict=False))[: judging.pairs_per_prompt]
        ]
        kept = [pair for pair in drawn if pair.ours != pair.other]
        comparisons.append(ArmPairs(arm, other, kept, len(drawn) - len(kept)))
    return comparisons


def judgement_sentence(judged: ArmJudgement) -> str:
    """What a judge says of one arm against another, or why it says nothing."""
    found, ours, other = judged.statistics, method_label(judged.arm), method_label(judged.against)
    if found.reason:
        return f"No judgement of {ours} and {other} by {judged.judge}: {found.reason}."
    rate, controlled = found.win_rate, found.length_controlled.rate
    side = "is preferred to" if rate.low > 0.5 else "loses to" if rate.high < 0.5 else "is not told from"
    equal = "" if controlled.not_estimable else f"; at equal lengths {_percent(controlled)}"
    return (
        f"By the judge {judged.judge}, {ours} {side} {other}: it wins {_percent(rate)} of {found.pairs} pairs{equal}; both "
        f"orders agree on {found.consistency.value:.0%} of them."
    )


def _responses(
    rows: Sequence[SampleRow], rewards: EvaluationRewards, where: str
) -> tuple[list[dict[str, list[str]]], list[Prompt]]:
    """Arm → responses, and the prompt, for each prompt in the order of the rewards.

    Rows are written prompt by prompt, each with as many as any other.
    """
    count = len(rewards.prompts)
    if not rows or len(rows) % count:
        raise DataError(
            f"{where}: samples.jsonl has {len(rows)} rows, which are not as many for each of the {count} prompts of "
            "rewards.json: it is cut off or of another evaluation; evaluate again"
        )
    size = len(rows) // count
    responses: list[dict[str, list[str]]] = []
    prompts = []
    for i, identity in enumerate(rewards.prompts):
        own = rows[i * size : (i + 1) * size]
        prompt = _prompt(own[0])
        if prompt.id != identity or any(row["prompt"] != prompt.text for row in own):
            raise DataError(
                f"{where}: samples.jsonl:{i * size + 1}: the prompt {prompt.text[:60]!r} is not the one of rewards.json there: "
                "the files are of different evaluations, or of an earlier version that did not record the turns before "
                "the last one; evaluate again"
            )
        of_arm: dict[str, list[str]] = {}
        for row in own:
            of_arm.setdefault(row["arm"], []).append(row["response"])
        if lacking := [arm for arm in rewards.arms if arm not in of_arm]:
            raise DataError(f"{where}: samples.jsonl:{i * size + 1}: no sample of the arm {lacking[0]} of this prompt")
        responses.append(of_arm)
        prompts.append(prompt)
    return responses, prompts


def _prompt(row: SampleRow) -> Prompt:
    before = tuple(Message(turn["role"], turn["content"]) for turn in row.get("history", []))
    return Prompt((*before, Message("user", row["prompt"])))


def _judged_pairs(pairs: Sequence[Pair], verdicts: Sequence[PairVerdict]) -> tuple[JudgedPairs, list[int]]:
    """The verdicts as numbers, and the places of the pairs that have them."""
    places = [i for i, each in enumerate(verdicts) if each.first is not None and each.second is not None]
    judged = JudgedPairs(
        first=np.array([_OURS_FIRST[verdicts[i].first or ""] for i in places], np.float64),
        second=np.array([_OURS_SECOND[verdicts[i].second or ""] for i in places], np.float64),
        longer=np.array([pairs[i].longer for i in places], np.float64),
        clusters=Clusters([pairs[i].cluster for i in places]),
        errors=len(pairs) - len(places),
    )
    return judged, places


def _of_arm(judge: str, compared: ArmPairs, verdicts: Sequence[PairVerdict]) -> ArmJudgement:
    judged, _ = _judged_pairs(compared.pairs, verdicts)
    found = judgement_statistics(judged)
    problem = next((each.problem for each in verdicts if each.problem), "")
    if not compared.pairs:
        found = replace(found, reason=f"all {compared.identical} pairs of responses are equal")
    elif found.diagnosis == "unreadable":
        found = replace(found, reason=f"{found.reason}; the first: {problem}")
    return ArmJudgement(judge, compared.arm, compared.against, compared.identical, found, problem)


def _adjusted(judged: list[ArmJudgement]) -> list[ArmJudgement]:
    tested = [each for each in judged if not each.statistics.reason and each.statistics.win_rate.p_value is not None]
    adjusted = holm([each.statistics.win_rate.p_value or 0.0 for each in tested])
    found = {id(each): p for each, p in zip(tested, adjusted, strict=True)}
    return [replace(each, adjusted_p=found.get(id(each))) for each in judged]


def _agreement(compared: ArmPairs, first: Sequence[PairVerdict], second: Sequence[PairVerdict]) -> Agreement:
    of_each = [_judged_pairs(compared.pairs, each) for each in (first, second)]
    shared = sorted(set(of_each[0][1]) & set(of_each[1][1]))
    if not shared:
        nothing = Estimate(math.nan, NotEstimable("no pair has a verdict of both judges"))
        return Agreement(compared.arm, compared.against, 0, nothing)
    said = []
    for judged, places in of_each:
        by_place = dict(zip(places, outcomes(judged).tolist(), strict=True))
        said.append([by_place[i] for i in shared])
    clusters = Clusters([compared.pairs[i].cluster for i in shared])
    return Agreement(compared.arm, compared.against, len(shared), cohen_kappa(said[0], said[1], clusters))


def _rows(comparisons: Sequence[ArmPairs], verdicts: Mapping[str, list[list[PairVerdict]]]) -> list[dict[str, Any]]:
    return [
        {
            "judge": judge,
            "arm": compared.arm,
            "against": compared.against,
            "prompt": pair.prompt.id,
            "first": said.first,
            "second": said.second,
            "longer": pair.longer,
            "problem": said.problem or None,
            "ours": pair.ours,
            "other": pair.other,
        }
        for judge, of_judge in verdicts.items()
        for compared, of_arm in zip(comparisons, of_judge, strict=True)
        for pair, said in zip(compared.pairs, of_arm, strict=True)
    ]


def _percent(estimate: Estimate) -> str:
    if estimate.not_estimable is not None:
        return f"{estimate.value:.0%} (no interval: {estimate.not_estimable})"
    return f"{estimate.value:.0%} (95 % {estimate.low:.0%} to {estimate.high:.0%})"
