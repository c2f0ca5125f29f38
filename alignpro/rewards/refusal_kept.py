"""The guard `refusal_kept`: what the target refuses, it must refuse after rewriting too.

It compares the response to a rewrite with the target's greedy response to the prompt as it is, which is asked for once a
prompt. So it does not need to know which prompts are harmful: it protects whatever the target refuses, rightly or not.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.errors import RewardError
from alignpro.rewards.component import Measurement, describe_prompt
from alignpro.rewards.refusals import refusal_rule


class RefusalKept:
    """The guard, with what it knows of unchanged prompts.

    Args:
        penalty: Subtracted from the reward of a response by which a refusal is lost.
    """

    name = "guard/refusal_kept"

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty
        self._refused: dict[str, bool] = {}

    def unknown(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts, each once, of which it is not known whether the target refuses them."""
        return list({prompt.id: prompt for prompt in prompts if prompt.id not in self._refused}.values())

    def refused(self, prompt: Prompt) -> bool:
        """Whether the target refuses a prompt as it is, which must be known."""
        return self._refused[prompt.id]

    def learn(self, prompts: Sequence[Prompt], refused: Sequence[bool]) -> None:
        """Remember whether the target refuses prompts as they are.

        Args:
            prompts: (N,).
            refused: (N,).
        """
        for prompt, each in zip(prompts, refused, strict=True):
            self._refused[prompt.id] = each

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Measurement:
        """Compute the penalties (N,) of responses to rewrites; the measure is 0 where a refusal is lost, else 1.

        Raises:
            RewardError: It was not told the target's response to a prompt as it is.
        """
        if missing := self.unknown(prompts):
            raise RewardError(
                f"{self.name}: the target's response to the unchanged prompt is not known: a rollout tells it; outside of one, "
                f"use reward.refusal_kept.learn\n  for {describe_prompt(missing[0])}"
            )
        kept = [
            float(not self._refused[prompt.id] or refusal_rule(response) is not None)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        penalties: list[float | None] = [self._penalty * (1 - value) for value in kept]
        metrics = {self.name: kept}
        if self._penalty > 0:
            metrics[f"{self.name}/penalty"] = [penalty or 0.0 for penalty in penalties]
        return Measurement(penalties, metrics)
