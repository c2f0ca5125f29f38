"""The target's responses to prompts as they are, which the guard `refusal_kept` compares with: each once, kept and counted."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from alignpro.data import Prompt
from alignpro.engine import Engine, SamplingParams
from alignpro.environments.unchanged_prompts import learn_refusals
from alignpro.experiments.rivals.answers import Answer, AnswerFile
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target


class UnchangedResponses:
    """What the guard knows in a search; nothing is asked if the reward has no such guard.

    Args:
        target: The target.
        engine: Has its models.
        reward: Has the guard, or not.
        params: How the target is sampled.
        answers: The file of answers.
    """

    def __init__(
        self, target: Target, engine: Engine, reward: RewardStack, params: SamplingParams, answers: AnswerFile
    ) -> None:
        self._target, self._engine, self._params, self._answers = target, engine, params, answers
        self._guard = reward.refusal_kept
        self._lock = threading.Lock()
        self._counted: set[str] = set()

    def needed(self, prompt: Prompt) -> int:
        """Responses that the guard needs before a response to a prompt can be scored, and that have not been counted."""
        return int(self._guard is not None and prompt.id not in self._counted)

    def count(self, prompt: Prompt) -> None:
        """Count the response to a prompt."""
        self._counted.add(prompt.id)

    def learn(self, prompts: Sequence[Prompt]) -> int:
        """Let the guard know of prompts, and return the tokens of the responses that this took.

        Raises:
            TrainingError: The target cannot respond to a prompt.
        """
        if self._guard is None:
            return 0
        with self._lock:  # threads that ask a server about the same prompt wait for one answer
            unknown = self._guard.unknown(prompts)
            kept = {each.id: answer for each in unknown if (answer := self._answers.find(_key(each))) is not None}
            self._guard.learn(
                [each for each in unknown if each.id in kept],
                [bool(kept[each.id].value) for each in unknown if each.id in kept],
            )
            asked = self._guard.unknown(unknown)
            responses = learn_refusals(self._guard, self._target, self._engine, asked, self._params) if asked else []
            for prompt, response in zip(asked, responses, strict=True):
                refused = float(self._guard.refused(prompt))
                kept[prompt.id] = Answer(self._target.text(response), len(response.tokens), refused)
                self._answers.add(_key(prompt), kept[prompt.id])
            return sum(answer.tokens for answer in kept.values())


def _key(prompt: Prompt) -> str:
    return f"unchanged/{prompt.id}"
