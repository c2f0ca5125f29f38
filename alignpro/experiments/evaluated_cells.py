"""What the cells of an experiment were evaluated to: one record for each arm, with the cell that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alignpro.evaluation.comparison import Record
from alignpro.evaluation.evaluated import find_evaluations, records_of
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.rewards_file import ArmRewards
from alignpro.experiments.cells import Cell
from alignpro.theory.statistics import Clusters, SeedRewards


@dataclass(frozen=True)
class MethodRecords:
    """One method of one group, with a record for each seed."""

    task: str
    target: str
    prompter: str | None
    method: str
    """Its key in the comparison."""
    label: str
    cell: Cell
    """That of its first seed."""
    records: Sequence[Record]

    @property
    def prompts(self) -> list[str]:
        """(P,) the ids of the held-out prompts, sorted: so are all below, so that methods are paired by prompt."""
        return sorted(self.records[0].rewards.prompts)

    @property
    def arms(self) -> dict[int, ArmRewards]:
        """Seed → rewards and KL."""
        found = {}
        for record in self.records:
            (arm,), order = record.rewards.arms.values(), _order(record)
            kl = None if arm.kl is None else arm.kl[order]
            found[record.seed] = ArmRewards(arm.raw[order], arm.penalised[order], kl)
        return found

    @property
    def clusters(self) -> Clusters:
        """Of the held-out prompts."""
        first = self.records[0]
        return Clusters([first.rewards.clusters[i] for i in _order(first)])

    @property
    def rewards(self) -> SeedRewards:
        """Without penalties, by seed."""
        return SeedRewards.of({seed: arm.raw for seed, arm in self.arms.items()})

    @property
    def kl(self) -> SeedRewards | None:
        """The KL of each prompt, by seed; None if a seed has none."""
        known = {seed: arm.kl[:, None] for seed, arm in self.arms.items() if arm.kl is not None}
        return SeedRewards.of(known) if len(known) == len(self.records) else None


def _order(record: Record) -> npt.NDArray[np.int64]:
    """(P,) the places of a record's prompts in the order of their ids."""
    return np.argsort(np.array(record.rewards.prompts), kind="stable")


def evaluated_methods(done: Sequence[Cell]) -> list[MethodRecords]:
    """The methods of all groups in the order of their first cells, without evaluations on several targets at once.

    Args:
        done: Cells whose evaluations are there, each with its record.json.

    Raises:
        DataError: A file of an evaluation is damaged.
    """
    of_directory = {str(cell.directory / "evaluation"): cell for cell in done}
    records, _ = records_of(find_evaluations([cell.directory / "evaluation" for cell in done]))
    groups: dict[tuple[str, str, str | None, str], list[Record]] = {}
    for record in records:
        if record.origin not in of_directory:
            continue  # one of several targets, in a directory below that of its cell
        groups.setdefault((record.task, record.target, record.prompter, record.method), []).append(record)
    return [
        MethodRecords(
            task,
            target,
            prompter,
            method,
            each[0].label or method_label(method),
            of_directory[each[0].origin],
            each,
        )
        for (task, target, prompter, method), each in groups.items()
    ]


def by_group(methods: Sequence[MethodRecords]) -> dict[tuple[str, str, str], list[MethodRecords]]:
    """(task, target, prompter) → its methods, those without a prompter included in the groups of all."""
    groups: dict[tuple[str, str, str], list[MethodRecords]] = {}
    for task, target in dict.fromkeys((each.task, each.target) for each in methods):
        same = [each for each in methods if (each.task, each.target) == (task, target)]
        prompters = list(dict.fromkeys(each.prompter for each in same if each.prompter is not None))
        for prompter in prompters or [""]:
            groups[task, target, prompter] = [each for each in same if each.prompter in (None, prompter)]
    return groups
