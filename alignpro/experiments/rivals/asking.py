"""Every response that a rival gets of the target: within its number of calls, scored, and counted towards the best so far."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from alignpro.config import SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Engine, derive_seed
from alignpro.environments.base import sampling_params
from alignpro.environments.instruction import InstructionEnvironment
from alignpro.errors import ConfigError
from alignpro.experiments.rivals.answers import Answer, AnswerFile
from alignpro.prompting.rewrite_template import RewriteTemplate
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target


class CallsSpent(BaseException):
    """The next response would be one too many. It is no `Exception`: optimisers count those as failed examples and go on."""


@dataclass(frozen=True)
class Best:
    """The best instruction so far."""

    calls: int
    """Responses of the target by then."""
    mean: float
    """Of its rewards on the validation prompts."""
    instruction: str


class Scoreboard:
    """The rewards of instructions on the validation prompts; an instruction counts once it has one on each.

    Args:
        validation: The ids of these prompts.
    """

    def __init__(self, validation: Sequence[str]) -> None:
        self._validation = set(validation)
        self._values: dict[str, dict[str, list[float]]] = {}
        self.curve: list[Best] = []
        """Each instruction that was the best, or whose mean as such changed, in order."""

    def add(self, instruction: str, prompt: str, value: float, calls: int) -> None:
        """Count a reward; those on other prompts do not count."""
        if prompt not in self._validation:
            return
        values = self._values.setdefault(instruction, {})
        values.setdefault(prompt, []).append(value)
        if len(values) == len(self._validation) and (best := self.best(calls)) is not None:
            last = self.curve[-1] if self.curve else None
            if last is None or (last.mean, last.instruction) != (best.mean, best.instruction):
                self.curve.append(best)

    def best(self, calls: int) -> Best | None:
        """The instruction with the highest mean, the first of equal ones; None if none counts yet."""
        means = self.means()
        if not means:
            return None
        instruction = max(means, key=lambda each: means[each])
        return Best(calls, means[instruction], instruction)

    def means(self) -> dict[str, float]:
        """Instruction → mean over the validation prompts, of those that count."""
        return {
            instruction: sum(sum(each) / len(each) for each in values.values()) / len(values)
            for instruction, values in self._values.items()
            if len(values) == len(self._validation)
        }


class TargetAsker:
    """Asks the target, at most so many times.

    Args:
        target: The target.
        engine: Has its models.
        reward: r*, with its guards on (x, x').
        respond: How the target is sampled.
        answers: The file of answers.
        limit: Most responses.
        seed: Of all samples.
        scoreboard: Counts the rewards.
    """

    def __init__(
        self,
        target: Target,
        engine: Engine,
        reward: RewardStack,
        respond: SamplingConfig,
        answers: AnswerFile,
        *,
        limit: int,
        seed: int,
        scoreboard: Scoreboard,
    ) -> None:
        self._target, self._engine, self._reward = target, engine, reward
        self._params = sampling_params(respond, 1)
        self._answers, self._seed, self._scoreboard = answers, seed, scoreboard
        self._lock = threading.Lock()
        # An engine runs one batch at a time; a server answers several questions at once.
        self._one_by_one: AbstractContextManager[object] = nullcontext() if target.remote else threading.Lock()
        self.limit = limit
        self.calls = 0
        """Responses so far."""
        self.tokens = 0
        """Of these responses."""
        self.refused = False
        """Whether one more was asked for than there may be."""

    @property
    def left(self) -> int:
        """How many more there may be."""
        return self.limit - self.calls

    def ask(self, instruction: str, prompt: Prompt) -> Answer:
        """A response of the target to a prompt with an instruction.

        Raises:
            CallsSpent: There may be no more; the target is not asked.
            AlignProError: The target or the reward failed.
        """
        with self._lock:
            if self.calls >= self.limit:
                self.refused = True
                raise CallsSpent
            self.calls += 1
        key = self._answers.question("target", instruction, prompt.id)
        answer = self._answers.find(key)
        if answer is None:
            answer = self._respond(instruction, prompt, key)
            self._answers.add(key, answer)
        assert answer.value is not None  # because it is the target's
        with self._lock:
            self.tokens += answer.tokens
            self._scoreboard.add(instruction, prompt.id, answer.value, self.calls)
        return answer

    def _respond(self, instruction: str, prompt: Prompt, key: str) -> Answer:
        environment = InstructionEnvironment(template(instruction), self._target, self._reward)
        with self._one_by_one:
            chains = environment.rollout(
                self._engine, [prompt], self._params, [derive_seed(self._seed, "rival", prompt.id, key)]
            )
            scores = environment.score([prompt], chains)
        (response,) = chains[0][0].responses
        return Answer(scores.responses[0][0][0], len(response.tokens), scores.values[0, 0].item())


def template(instruction: str) -> RewriteTemplate:
    """How an instruction changes a prompt: as a hand-written one does; an empty one leaves it as it is."""
    return RewriteTemplate(instruction if instruction.strip() else "{{ prompt }}", "instruction")


def usable(instruction: str) -> str:
    """A proposed text as an instruction: braces that make no template are text."""
    try:
        template(instruction)
    except ConfigError:
        for mark in ("{{", "}}", "{%", "%}", "{#", "#}"):
            instruction = instruction.replace(mark, " ".join(mark))
    return instruction
