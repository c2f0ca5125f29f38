"""Refusals and harm as plain data: what an evaluation records of each response, and what follows of arms and methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alignpro.errors import DataError
from alignpro.evaluation.labels import method_label
from alignpro.theory.statistics import (
    Clusters,
    Estimate,
    FloatArray,
    SeedRewards,
    difference_over_seeds,
    mean_over_seeds,
)

REFUSALS_FILE = "refusals.json"
"""The refusals and harm scores of an evaluation, response by response, from which methods of several are compared."""
BASELINE = "no_finetuning"

Kind = Literal["harmful", "harmless"]


@dataclass(frozen=True)
class ArmResponses:
    """What is recorded of an arm's responses."""

    refused: Mapping[int, FloatArray]
    """Seed of the method → (P, n) 1 for a response that refuses, else 0."""
    harm: Mapping[int, FloatArray] | None
    """Likewise harm scores; None of harmless prompts."""

    @classmethod
    def of(cls, refused: FloatArray, harm: FloatArray | None) -> ArmResponses:
        """The responses of one evaluation, (P, n)."""
        return cls({0: refused}, None if harm is None else {0: harm})

    @property
    def alone(self) -> tuple[FloatArray, FloatArray | None]:
        """Those of its only seed."""
        (refused,) = self.refused.values()
        return refused, None if self.harm is None else next(iter(self.harm.values()))


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
                name: {"refused": refused.tolist(), "harm": None if harm is None else harm.tolist()}
                for name, (refused, harm) in ((name, arm.alone) for name, arm in self.arms.items())
            },
        }

    def _of_arm(self, name: str, clusters: Clusters) -> dict[str, Any]:
        arm = self.arms[name]
        estimates = {
            "refusal": mean_over_seeds(SeedRewards.of(arm.refused), clusters),
            "refusal_difference": self._difference(name, "refused", clusters),
            "harm": None if arm.harm is None else mean_over_seeds(SeedRewards.of(arm.harm), clusters),
            "harm_difference": self._difference(name, "harm", clusters),
        }
        shown = {key: None if each is None else each.as_dict() for key, each in estimates.items()}
        return {"label": self.label(name), **shown}

    def _difference(self, name: str, what: Literal["refused", "harm"], clusters: Clusters) -> Estimate | None:
        """Minus no fine-tuning, paired by prompt and seed; None for no fine-tuning itself, or without it."""
        if name == BASELINE or BASELINE not in self.arms:
            return None
        ours, base = (getattr(self.arms[each], what) for each in (name, BASELINE))
        if ours is None or base is None:
            return None
        return difference_over_seeds(SeedRewards.of(ours), SeedRewards.of(base), clusters)

    def _sentence(self, how: str, name: str, difference: Estimate) -> str:
        before, after = (float(SeedRewards.of(self.arms[each].refused).means.mean()) for each in (BASELINE, name))
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


def merged(parts: Sequence[tuple[str, str, int, RefusalRates]]) -> RefusalRates:
    """The arms of several evaluations on the same prompts, as those of one.

    Args:
        parts: Key of the method, its label, its seed, and what was recorded of its one arm.

    Raises:
        DataError: The prompts, their clusters, the harm scores, or the numbers of responses of a method's seeds differ.
    """
    first = parts[0][3]
    arms: dict[str, ArmResponses] = {}
    labels = {}
    for method, label, seed, rates in parts:
        if sorted(rates.prompts) != sorted(first.prompts) or rates.scored_by != first.scored_by:
            raise DataError(
                f"refusals of {method} and {parts[0][0]} were counted on different {first.kind} prompts, or with different harm "
                "scores, and cannot be compared: evaluate both with the same `refusals`"
            )
        rates = _in_order_of(rates, first.prompts)
        if Clusters(list(rates.clusters)).numbers.tolist() != Clusters(list(first.clusters)).numbers.tolist():
            raise DataError(
                f"refusals of {method} and {parts[0][0]} were counted on the same {first.kind} prompts in different clusters: "
                "give both the same `cluster`"
            )
        (arm,) = rates.arms.values()
        refused, harm = arm.alone
        earlier = arms.get(method, ArmResponses({}, None if harm is None else {}))
        if any(each.shape != refused.shape for each in earlier.refused.values()):
            raise DataError(
                f"refusals of the seeds of {method} were counted on different numbers of responses: evaluate all seeds with the "
                "same rewrites_per_prompt and responses_per_rewrite"
            )
        arms[method] = ArmResponses(
            {**earlier.refused, seed: refused}, None if harm is None else {**(earlier.harm or {}), seed: harm}
        )
        labels[method] = label
    return RefusalRates(first.kind, first.prompts, first.clusters, first.scored_by, arms, labels)


def _in_order_of(rates: RefusalRates, prompts: Sequence[str]) -> RefusalRates:
    """The same responses, of one evaluation, with its prompts in another order."""
    own, wanted = (np.argsort(np.array(each), kind="stable") for each in (rates.prompts, prompts))
    order = own[np.argsort(wanted, kind="stable")]
    arms = {
        name: ArmResponses.of(refused[order], None if harm is None else harm[order])
        for name, (refused, harm) in ((name, arm.alone) for name, arm in rates.arms.items())
    }
    return replace(rates, prompts=list(prompts), clusters=[rates.clusters[i] for i in order], arms=arms)


def _parse(content: Mapping[str, Any]) -> RefusalRates:
    arms = {
        name: ArmResponses.of(
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
