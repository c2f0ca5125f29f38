"""Is a prompter worth training for a task? A sentence from the arms of `alignpro headroom`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.config.jobs import INSTRUCTION
from alignpro.evaluation.results import ArmSummary


@dataclass(frozen=True)
class Verdict:
    """Whether training is worth its cost, and why."""

    worth_training: bool
    sentence: str


def judge_headroom(arms: Sequence[ArmSummary], worthwhile: float) -> Verdict:
    """Judge a task by what instructions and Gibbs resampling gain over no fine-tuning.

    A gain is clear if it is at least ``worthwhile`` and its p-value, adjusted for the number of arms, is below .05.
    Instructions tell what the target can do, and Gibbs resampling what the prompter already writes.

    Args:
        arms: ``no_finetuning`` first, then instructions and ``gibbs_N`` with differences to it, and others.
        worthwhile: The least gain that is worth training for, in units of the reward.
    """
    if (constant := _constant(arms)) is not None:
        count = sum(arm.samples for arm in arms)
        return Verdict(
            False,
            f"not worth training: the reward is {constant:.4g} for all {count:,} samples, whatever the prompt says, so there "
            "is nothing to learn from: check the reward, or choose another task",
        )
    instruction = _best([arm for arm in arms if arm.name.startswith(INSTRUCTION)])
    gibbs = _best([arm for arm in arms if arm.name.startswith("gibbs_")])
    assert gibbs is not None  # there is always one
    of_gibbs = f"choosing among {gibbs.name.removeprefix('gibbs_')} rewrites of the prompter gains {_gain(gibbs)}"
    of_best = (
        "no instruction was tried"
        if instruction is None
        else f"the best instruction ({instruction.name.removeprefix(INSTRUCTION)}) gains {_gain(instruction)}"
    )
    over = f"over no fine-tuning ({arms[0].mean:.3f})"
    if _clear(gibbs, worthwhile):
        return Verdict(True, f"worth training: {of_gibbs} {over}; {of_best}")
    if instruction is not None and _clear(instruction, worthwhile):
        return Verdict(
            False,
            f"not yet worth training: {of_best} {over}, so the target can do it, but {of_gibbs}: the prompter hardly writes "
            "what pays; fine-tune it on moves that do, and measure again",
        )
    tried = [arm for arm in (instruction, gibbs) if arm is not None and arm.difference is not None]
    if any(arm.difference is not None and arm.difference.value >= worthwhile for arm in tried):
        return Verdict(
            False,
            f"undecided: {of_gibbs} and {of_best} {over}, which {arms[0].n} prompts do not tell from chance: measure on more",
        )
    return Verdict(
        False,
        f"not worth training: {of_gibbs} and {of_best} {over}, less than {worthwhile:g}: whatever the prompt says, this "
        "target does not do better",
    )


def _constant(arms: Sequence[ArmSummary]) -> float | None:
    """The reward, if it is the same in all samples of all arms."""
    values = np.concatenate([arm.rewards for arm in arms])
    varies = any(arm.variance.total > 0 for arm in arms) or np.ptp(values) > 0
    return None if varies else float(values[0])


def _best(arms: Sequence[ArmSummary]) -> ArmSummary | None:
    return max(arms, key=lambda arm: arm.mean, default=None)


def _clear(arm: ArmSummary, worthwhile: float) -> bool:
    return (
        arm.difference is not None
        and arm.difference.value >= worthwhile
        and arm.adjusted_p is not None
        and arm.adjusted_p < 0.05
    )


def _gain(arm: ArmSummary) -> str:
    assert arm.difference is not None  # every arm but no fine-tuning has one
    interval = "" if arm.difference.not_estimable else f" [{arm.difference.low:+.3f}, {arm.difference.high:+.3f}]"
    return f"{arm.difference.value:+.3f}{interval}"
