"""Refusals and harm as plain data: what an evaluation records of each response, and what follows of arms and methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alignpro.errors import DataError
from alignpro.evaluation.labels import method_label
from alignpro.theory.statistics import Clusters, Estimate, FloatArray, mean_estimate, paired_estimate

REFUSALS_FILE = "refusals.json"
"""The refusals and harm scores of an evaluation, response by response, from which methods of several are compared."""
BASELINE = "no_finetuning"

Kind = Literal["harmful", "harmless"]


@dataclass(frozen=True)
class ArmResponses:
    """What is recorded of an arm's responses."""

    refused: FloatArray
    """(P, n) 1 for a response that refuses, else 0."""
    harm: FloatArray | None
    """(P, n) harm scores; None of harmless prompts."""


@dataclass(frozen=True)
class RefusalRates:
    """The responses of arms to one kind of prompts."""

    kind: Kind
    prompts: Sequence[str]
    """(P,) ids."""
    clusters: Sequence[int]
    """(P,) the number of each prompt's cluster."""
    scored_by: str
    """What the harm score is; empty for harmless prompts."""
    arms: Mapping[str, ArmResponses]
    labels: Mapping[str, str] = field(default_factory=dict)
    """Arm → its name, where that is not the one of its key."""

    def label(self, name: str) -> str:
        """The name of an arm."""
        return self.labels.get(name) or method_label(name)

    def content(self) -> dict[str, Any]:
        """What follows of each arm, for summary.json and the report: rates and their differences to no fine-tuning."""
        clusters = Clusters(list(self.clusters))
        return {
            "prompts": clusters.prompts,
            "clusters": clusters.count,
            "harm": self.scored_by or None,
            "arms": {name: self._of_arm(name, clusters) for name in self.arms},
        }

    def warnings(self) -> list[str]:
        """A sentence for each arm that changes refusals for the worse, beyond its 95 % interval."""
        clusters, sign = Clusters(list(self.clusters)), -1 if self.kind == "harmful" else 1
        found = []
        for name in self.arms:
            difference = self._difference(name, "refused", clusters)
            if difference is not None and _beyond(difference, sign, clusters.count):
                found.append(self._sentence("lowers" if sign < 0 else "raises", name, difference))
        return found

    def as_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "kind": self.kind,
            "prompts": list(self.prompts),
            "clusters": list(self.clusters),
            "scored_by": self.scored_by,
            "arms": {
                name: {"refused": arm.refused.tolist(), "harm": None if arm.harm is None else arm.harm.tolist()}
                for name, arm in self.arms.items()
            },
        }

    def _of_arm(self, name: str, clusters: Clusters) -> dict[str, Any]:
        arm = self.arms[name]
        estimates = {
            "refusal": mean_estimate(arm.refused, clusters),
            "refusal_difference": self._difference(name, "refused", clusters),
            "harm": None if arm.harm is None else mean_estimate(arm.harm, clusters),
            "harm_difference": self._difference(name, "harm", clusters),
        }
        shown = {key: None if each is None else each.as_dict() for key, each in estimates.items()}
        return {"label": self.label(name), **shown}

    def _difference(self, name: str, what: Literal["refused", "harm"], clusters: Clusters) -> Estimate | None:
        """Minus no fine-tuning, paired by prompt; None for no fine-tuning itself, or without it."""
        if name == BASELINE or BASELINE not in self.arms:
            return None
        ours, base = (getattr(self.arms[each], what) for each in (name, BASELINE))
        return None if ours is None or base is None else paired_estimate(ours, base, clusters)

    def _sentence(self, how: str, name: str, difference: Estimate) -> str:
        before, after = (float(self.arms[each].refused.mean()) for each in (BASELINE, name))
        interval = (
            "the same for every prompt"
            if difference.not_estimable
            else f"95 % {difference.low:+.0%} to {difference.high:+.0%}".replace("-", "−")
        )
        return (
            f"Warning: {self.label(name)} {how} refusals of {self.kind} prompts from {before:.0%} to {after:.0%} "
            f"(difference {interval})."
        )


def refusals_content(found: Sequence[RefusalRates]) -> dict[str, Any]:
    """The content for summary.json: what was found by kind of prompts, and the warnings, those of harmful prompts first."""
    ordered = sorted(found, key=lambda each: each.kind != "harmful")
    return {
        "warnings": [sentence for each in ordered for sentence in each.warnings()],
        **{each.kind: each.content() for each in ordered},
    }


def write_refusals(directory: Path, found: Sequence[RefusalRates]) -> None:
    """Write what was recorded of each response."""
    (directory / REFUSALS_FILE).write_text(json.dumps([each.as_dict() for each in found]), encoding="utf-8")


def read_refusals(directory: Path) -> list[RefusalRates]:
    """What an evaluation recorded; nothing if it did not count refusals.

    Raises:
        DataError: The file is damaged.
    """
    file = directory / REFUSALS_FILE
    if not file.is_file():
        return []
    try:
        return [_parse(each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: cannot be read ({type(error).__name__}: {error}): remove it to report without refusals, or evaluate again"
        ) from error


def merged(parts: Sequence[tuple[str, str, RefusalRates]]) -> RefusalRates:
    """The arms of several evaluations on the same prompts, as those of one; of several seeds of a method, all responses.

    Args:
        parts: Key of the method, its label, and what was recorded of its one arm.

    Raises:
        DataError: The prompts or the harm scores differ.
    """
    first = parts[0][2]
    arms: dict[str, ArmResponses] = {}
    labels = {}
    for method, label, rates in parts:
        if list(rates.prompts) != list(first.prompts) or rates.scored_by != first.scored_by:
            raise DataError(
                f"refusals of {method} and {parts[0][0]} were counted on different {first.kind} prompts, or with different harm "
                "scores, and cannot be compared: evaluate both with the same `refusals`"
            )
        (arm,) = rates.arms.values()
        earlier = arms.get(method)
        if earlier is not None:
            harms = [each.harm for each in (earlier, arm) if each.harm is not None]
            arm = ArmResponses(
                np.concatenate([earlier.refused, arm.refused], axis=1), np.concatenate(harms, axis=1) if harms else None
            )
        arms[method] = arm
        labels[method] = label
    return RefusalRates(first.kind, first.prompts, first.clusters, first.scored_by, arms, labels)


def _parse(content: Mapping[str, Any]) -> RefusalRates:
    arms = {
        name: ArmResponses(
            np.array(arm["refused"], np.float64), None if arm["harm"] is None else np.array(arm["harm"], np.float64)
        )
        for name, arm in content["arms"].items()
    }
    return RefusalRates(content["kind"], content["prompts"], content["clusters"], content["scored_by"], arms)


def _beyond(difference: Estimate, sign: int, clusters: int) -> bool:
    """Whether a difference lies on one side of zero; one that is the same for every prompt has no interval, and does."""
    if difference.not_estimable is not None:
        return clusters > 1 and sign * difference.value > 0
    return difference.low > 0 if sign > 0 else difference.high < 0
