"""The comparison of many evaluations: methods over seeds and prompts, for each task, prompter and target.

    records: one per method and seed ──► groups with the same prompts and reward ──► means, differences, shares, costs

Pure data in and out; `alignpro.evaluation.evaluated` reads records from directories, and the report displays the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from alignpro.errors import DataError
from alignpro.evaluation.comparison_results import SEEN_DIFFERENCE, Comparison, Cost, Group, MethodResult, Versus
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.rewards_file import ArmRewards, EvaluationRewards
from alignpro.evaluation.verdict import size_sentence, verdict_sentence
from alignpro.theory.statistics import (
    Clusters,
    SeedRewards,
    VarianceParts,
    difference_error,
    difference_over_seeds,
    gap_over_seeds,
    holm,
    mean_over_seeds,
    nested_variance,
    sample_size,
)

BASELINE, ORACLE, INSTRUCTION = "no_finetuning", "oracle", "instruction"


@dataclass(frozen=True)
class Record:
    """One method, trained or sampled with one seed, and evaluated on the held-out prompts of a task."""

    task: str
    prompter: str | None
    """None for a method without a prompter: it is compared with those of every prompter."""
    target: str
    method: str
    """Its key: that of an arm, such as ``align_pro``, ``oracle``, ``no_finetuning``, ``instruction_short``."""
    seed: int
    rewards: EvaluationRewards
    """With an arm of the method's name, or a single arm."""
    cost: Cost = field(default_factory=Cost)
    label: str = ""
    """Name of the method in the report; by default that of the arm."""
    origin: str = ""
    """Where it was read from, for messages."""

    @property
    def name(self) -> str:
        """How messages name it."""
        return self.origin or f"{self.task}/{self.prompter or '-'}/{self.target}/{self.method}/seed {self.seed}"


def compare(records: Iterable[Record]) -> Comparison:
    """Compare methods over seeds and prompts, for each task, prompter and target.

    Args:
        records: In the order of the report; a method has one per seed.

    Raises:
        DataError: There are none; two records of a task and target were evaluated on different prompts or rewards; a record
            lacks its method's arm; two have the same seed.
    """
    given = list(records)
    if not given:
        raise DataError("a comparison needs at least one evaluation")
    groups = []
    for task, target in dict.fromkeys((record.task, record.target) for record in given):
        same = _aligned([record for record in given if (record.task, record.target) == (task, target)])
        prompters = list(dict.fromkeys(each.prompter for each in same if each.prompter is not None))
        for prompter in prompters or [""]:
            groups.append(_group([each for each in same if each.prompter in (None, prompter)], prompter))
    groups, tests = _adjusted(groups)
    return Comparison(groups, tests, verdict_sentence(groups))


def _aligned(records: list[Record]) -> list[Record]:
    """The records with their prompts in the order of the first.

    Raises:
        DataError: Prompts, clusters or rewards differ; names both records.
    """
    first = records[0]
    aligned = [first]
    for record in records[1:]:
        both = f"{record.name} and {first.name}"
        ours, theirs = list(record.rewards.prompts), list(first.rewards.prompts)
        if sorted(ours) != sorted(theirs):
            differ = len(set(ours) ^ set(theirs)) or abs(len(ours) - len(theirs))
            raise DataError(
                f"{both} were evaluated on different prompts and cannot be compared: {differ} of {len(ours)} and "
                f"{len(theirs)} are in one of them only; evaluate both with the same data, data.holdout and prompts"
            )
        if record.rewards.reward != first.rewards.reward:
            raise DataError(
                f"{both} were scored with different rewards ({record.rewards.reward} and {first.rewards.reward}) and cannot "
                "be compared; evaluate both with the same `reward`"
            )
        order = np.argsort(np.argsort(np.array(theirs), kind="stable"), kind="stable")
        aligned.append(
            replace(record, rewards=_ordered(record.rewards, np.argsort(np.array(ours), kind="stable")[order]))
        )
        numbers = [Clusters(list(each.rewards.clusters)).numbers.tolist() for each in (aligned[-1], first)]
        if numbers[0] != numbers[1]:
            raise DataError(f"{both} have the same prompts in different clusters; give both the same data.cluster")
    return aligned


def _ordered(rewards: EvaluationRewards, places: np.ndarray) -> EvaluationRewards:
    return replace(
        rewards,
        prompts=[rewards.prompts[i] for i in places],
        clusters=[rewards.clusters[i] for i in places],
        arms={
            name: ArmRewards(arm.raw[places], arm.penalised[places], None if arm.kl is None else arm.kl[places])
            for name, arm in rewards.arms.items()
        },
    )


def _group(records: list[Record], prompter: str) -> Group:
    clusters = Clusters(list(records[0].rewards.clusters))
    records = sorted(records, key=lambda record: _place(record.method))
    of_method = {
        key: [each for each in records if each.method == key] for key in dict.fromkeys(r.method for r in records)
    }
    systems = {key: _system(each) for key, each in of_method.items()}
    results = {key: _summary(each, systems[key], clusters) for key, each in of_method.items()}
    instructions = [key for key in results if key.startswith(INSTRUCTION)]
    best = max(instructions, key=lambda key: results[key].mean.value, default=None)
    for key, result in results.items():
        baseline = instruction = gap = None
        if BASELINE in systems and key != BASELINE:
            baseline = _versus(systems[key], systems[BASELINE], results[BASELINE].label, clusters)
        if best is not None and key not in (*instructions, BASELINE):
            instruction = _versus(systems[key], systems[best], results[best].label, clusters)
        if {BASELINE, ORACLE} <= systems.keys() and key not in (BASELINE, ORACLE):
            gap = gap_over_seeds(systems[BASELINE], systems[key], systems[ORACLE], clusters)
        results[key] = replace(result, versus_baseline=baseline, versus_instruction=instruction, gap=gap)
    first = records[0]
    return Group(first.task, prompter, first.target, clusters.prompts, clusters.count, list(results.values()), best)


def _place(method: str) -> int:
    """Where a method stands in tables and figures: from what costs nothing to the oracle."""
    order = (BASELINE, INSTRUCTION, "sft_prompter", "gibbs", "best_of")
    known = (place for place, key in enumerate(order) if method.startswith(key))
    return len(order) + 1 if method.startswith(ORACLE) else next(known, len(order))


def _arm(record: Record) -> np.ndarray:
    """(P, K, M) rewards of a record's method, without penalties."""
    return _arms_rewards(record)[0]


def _arms_rewards(record: Record) -> tuple[np.ndarray, np.ndarray]:
    arms = record.rewards.arms
    arm = arms.get(record.method) or (next(iter(arms.values())) if len(arms) == 1 else None)
    if arm is None:
        raise DataError(f"{record.name}: its rewards hold no arm {record.method} (arms: {', '.join(arms)})")
    return arm.raw, arm.penalised


def _system(records: list[Record]) -> SeedRewards:
    """The rewards of one method, by seed.

    Raises:
        DataError: Two have the same seed, or seeds have different numbers of rewards.
    """
    rewards: dict[int, np.ndarray] = {}
    shape = _arm(records[0]).shape
    for record in records:
        if record.seed in rewards:
            other = next(each for each in records if each.seed == record.seed)
            raise DataError(
                f"{record.name} and {other.name} are both {record.method} with seed {record.seed}; leave one out"
            )
        rewards[record.seed] = _arm(record)
        if rewards[record.seed].shape != shape:
            raise DataError(
                f"{record.name} has {list(rewards[record.seed].shape)} rewards [prompts, rewrites, responses], "
                f"{records[0].name} {list(shape)}; evaluate all seeds with the same rewrites_per_prompt and "
                "responses_per_rewrite"
            )
    return SeedRewards.of(dict(rewards))


def _summary(records: list[Record], system: SeedRewards, clusters: Clusters) -> MethodResult:
    parts = [nested_variance(_arm(record)) for record in records]
    names = ("total", "prompts", "rewrites", "responses")
    costs = {
        key: [value for record in records if (value := getattr(record.cost, key)) is not None]
        for key in ("target_calls", "tokens", "seconds")
    }
    return MethodResult(
        method=records[0].method,
        label=records[0].label or method_label(records[0].method),
        seeds=len(records),
        mean=mean_over_seeds(system, clusters),
        penalised=float(np.mean([_arms_rewards(record)[1].mean() for record in records])),
        variance=VarianceParts(**{name: float(np.mean([getattr(part, name) for part in parts])) for name in names}),
        samples=system.rewards.size,
        seed_means=tuple(float(mean) for mean in system.means.mean(1)),
        cost=Cost(**{key: float(np.mean(values)) if values else None for key, values in costs.items()}),
    )


def _versus(ours: SeedRewards, other: SeedRewards, label: str, clusters: Clusters) -> Versus:
    difference = difference_over_seeds(ours, other, clusters)
    if clusters.count < 2:
        return Versus(label, difference, None, "")
    needed = sample_size(SEEN_DIFFERENCE, difference_error(ours, other, clusters), clusters)
    return Versus(label, difference, None, size_sentence(needed, SEEN_DIFFERENCE))


def _adjusted(groups: list[Group]) -> tuple[list[Group], int]:
    """The groups with the p-values of all their differences adjusted together, and the number of differences.

    A difference of two methods without a prompter is in the groups of all prompters, and counts once.
    """
    p: dict[tuple[str, str, str, str, float], float] = {}
    for group in groups:
        for key, versus in _differences(group):
            if versus.difference.p_value is not None:
                p[key] = versus.difference.p_value
    values = dict(zip(p, holm(list(p.values())), strict=True))
    done = []
    for group in groups:
        found = {id(versus): values.get(key) for key, versus in _differences(group)}
        methods = [
            replace(
                each,
                versus_baseline=each.versus_baseline
                and replace(each.versus_baseline, adjusted_p=found[id(each.versus_baseline)]),
                versus_instruction=each.versus_instruction
                and replace(each.versus_instruction, adjusted_p=found[id(each.versus_instruction)]),
            )
            for each in group.methods
        ]
        done.append(replace(group, methods=methods))
    return done, len(p)


def _differences(group: Group) -> list[tuple[tuple[str, str, str, str, float], Versus]]:
    """Each difference of a group, with a key that is the same in two groups if the difference is."""
    return [
        ((group.task, group.target, each.method, versus.other, versus.difference.value), versus)
        for each in group.methods
        for versus in (each.versus_baseline, each.versus_instruction)
        if versus is not None
    ]
