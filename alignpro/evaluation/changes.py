"""The prompts that gained and lost most, with the rewrite as a difference of words to the prompt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alignpro.evaluation.results import SampleRow

_MOST_WORDS = 600
"""Words of a text that are compared and shown; longer texts are cut."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text."""

    kind: Literal["same", "deleted", "inserted"]
    text: str


@dataclass(frozen=True)
class Change:
    """One prompt, with and without the rewrite."""

    gain: float
    """Mean reward of the prompt's samples minus that of its samples without fine-tuning."""
    rewards: tuple[float, float]
    """Mean reward without fine-tuning, and with the rewrites."""
    rewrite: Sequence[Piece]
    """From the prompt to the rewrite."""
    before: str
    """A response to the prompt."""
    after: str
    """A response to the rewrite."""
    title: str = ""
    """Task and target, in a report on several."""


def word_diff(a: str, b: str) -> list[Piece]:
    """The words that are deleted from ``a`` and inserted to give ``b``; spaces alone are no difference.

    The pieces that are not deleted give ``b``, those not inserted ``a`` up to spaces.
    """
    old, new = (re.findall(r"\S+\s*|^\s+", _cut(text)) for text in (a, b))
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    pieces: list[Piece] = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", "".join(new[k:m])))
            continue
        if j > i:
            pieces.append(Piece("deleted", "".join(old[i:j])))
        if m > k:
            pieces.append(Piece("inserted", "".join(new[k:m])))
    return pieces


def largest_changes(rows: Sequence[SampleRow], count: int = 5, *, title: str = "") -> list[Change]:
    """The prompts whose sampled rewards gained most, then those that lost most; at most ``count`` each.

    The rewrite shown is the one with the highest reward of a prompt that gained, the lowest of one that lost.
    """
    of_arm = {
        key: _by_prompt([row for row in rows if row["arm"] == key and np.isfinite(row["reward"])])
        for key in ("no_finetuning", "align_pro")
    }
    base, ours = of_arm["no_finetuning"], of_arm["align_pro"]
    gains = {prompt: _mean(ours[prompt]) - _mean(base[prompt]) for prompt in ours if prompt in base}
    order = sorted(gains, key=lambda prompt: -gains[prompt])
    gained = [prompt for prompt in order if gains[prompt] > 0][:count]
    lost = [prompt for prompt in reversed(order) if gains[prompt] < 0][:count]
    changes = []
    for prompt in [*gained, *lost]:
        ordered = sorted(ours[prompt], key=lambda row: row["reward"])
        shown = ordered[-1] if gains[prompt] > 0 else ordered[0]
        changes.append(
            Change(
                gains[prompt],
                (_mean(base[prompt]), _mean(ours[prompt])),
                word_diff(prompt, prompt if shown["rewrite"] is None else shown["rewrite"]),
                _cut(base[prompt][0]["response"]),
                _cut(shown["response"]),
                title,
            )
        )
    return changes


def _by_prompt(rows: Sequence[SampleRow]) -> dict[str, list[SampleRow]]:
    groups: dict[str, list[SampleRow]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def _mean(rows: Sequence[SampleRow]) -> float:
    return float(np.mean([row["reward"] for row in rows]))


def _cut(text: str) -> str:
    words = re.findall(r"^\s+|\S+\s*", text)
    return text if len(words) <= _MOST_WORDS else "".join(words[:_MOST_WORDS]) + "…"
