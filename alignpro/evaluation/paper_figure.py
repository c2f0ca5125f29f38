"""The values of the paper's figure, to be drawn beside one's own."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from alignpro.evaluation.labels import method_label
from alignpro.evaluation.results import ArmGroup, Bar

_FILE = Path(__file__).with_name("paper_figure.json")


@dataclass(frozen=True)
class PaperFigure:
    """The paper's bars."""

    groups: dict[str, list[ArmGroup]]
    """Data set → one group of bars per prompter-target pair."""
    source: str
    """Where they come from, and how exact they are."""


def paper_figure() -> PaperFigure:
    """Read the packaged values: mean reward and reward variance, without intervals, which the paper does not give."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    groups = {
        data: [
            ArmGroup(
                pair,
                [
                    Bar(name, method_label(name), mean, (math.nan, math.nan), variance)
                    for name, mean, variance in zip(
                        content["arms"], content["mean"][data][i], content["variance"][data][i], strict=True
                    )
                ],
            )
            for i, pair in enumerate(content["pairs"])
        ]
        for data in content["mean"]
    }
    return PaperFigure(groups, f"{content['source']}; {content['how']}")
