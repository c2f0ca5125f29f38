"""Every response that a rival gets of the target: within its number of calls, scored, and counted towards the best so far.

Those to prompts as they are, which the guard `refusal_kept` compares with, are responses of the target, too."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby

from alignpro.config import SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Engine, derive_seed
from alignpro.environments.base import sampling_params
from alignpro.environments.instruction import InstructionEnvironment
from alignpro.errors import ConfigError
from alignpro.experiments.rivals.answers import Answer, AnswerFile
from alignpro.experiments.rivals.gathering import Gathering
from alignpro.experiments.rivals.unchanged import UnchangedResponses
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


@dataclass(frozen=True, eq=False)
class _Question:
    instruction: str
    prompt: Prompt
    answer: Future[Answer] = field(default_factory=Future)


class TargetAsker:
    """Asks the target, at most so many times.

    Questions of several threads to a model of this process are answered in one batch, and count in the order of their texts: what
    is counted does not depend on which thread came first, nor, if their number is announced, on how fast they are.

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
        self._unchanged = UnchangedResponses(target, engine, reward, self._params, answers)
        self._lock = threading.Condition()
        self._open = 0  # admitted and not yet answered
        # A server answers several questions at once, whenever they come.
        self._gathering = None if target.remote else Gathering(self._answer)
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

    @property
    def best(self) -> str | None:
        """The best instruction so far; None if none has been evaluated on all validation prompts."""
        best = self._scoreboard.best(self.calls)
        return best.instruction if best else None

    def announce(self, count: int) -> None:
        """Say that so many threads will ask at the same time, each once."""
        if self._gathering is not None:
            self._gathering.announce(count)

    def ask(self, instruction: str, prompt: Prompt) -> Answer:
        """A response of the target to a prompt with an instruction.

        Raises:
            CallsSpent: There may be no more; the target is not asked.
            AlignProError: The target or the reward failed.
        """
        question = _Question(instruction, prompt)
        if self._gathering is None:
            self._answer([question])
        else:
            self._gathering.ask(question)
        return question.answer.result()

    def ask_all(self, instruction: str, prompts: Sequence[Prompt]) -> list[Answer]:
        """A response to each prompt, in one batch, while no thread asks; see `ask`."""
        questions = [_Question(instruction, prompt) for prompt in prompts]
        self._answer(questions)
        return [question.answer.result() for question in questions]

    def _answer(self, questions: Sequence[_Question]) -> None:
        """Answer questions, or tell each why not."""
        calls, refused = self._admit(sorted(questions, key=lambda each: (each.instruction, each.prompt.id)))
        try:
            of_unchanged = self._unchanged.learn([each.prompt for each in calls])
            keys = [self._answers.question("target", each.instruction, each.prompt.id) for each in calls]
            answers = {key: answer for key in keys if (answer := self._answers.find(key)) is not None}
            new = [(key, each) for key, each in zip(keys, calls, strict=True) if key not in answers]
            for instruction, group in groupby(new, key=lambda each: each[1].instruction):
                asked = list(group)
                answers |= self._respond(instruction, [each.prompt for _, each in asked], [key for key, _ in asked])
            with self._lock:
                self.tokens += of_unchanged
                for key, (question, number) in zip(keys, calls.items(), strict=True):
                    value = answers[key].value
                    assert value is not None  # because it is the target's
                    self.tokens += answers[key].tokens
                    self._scoreboard.add(question.instruction, question.prompt.id, value, number)
            for key, question in zip(keys, calls, strict=True):
                question.answer.set_result(answers[key])
        except BaseException as error:  # every thread that waits gets it
            for question in calls:
                if not question.answer.done():
                    question.answer.set_exception(error)
        with self._lock:
            self._open -= len(calls)
            self._lock.notify_all()
            if refused:  # the search ends when one is told: not before all that was asked is counted
                self._lock.wait_for(lambda: self._open == 0)
        for question in refused:
            question.answer.set_exception(CallsSpent())

    def _admit(self, questions: Sequence[_Question]) -> tuple[dict[_Question, int], list[_Question]]:
        """The questions that are within the limit, with the number of the call that each is, and the others."""
        admitted: dict[_Question, int] = {}
        with self._lock:
            for question in questions:
                needed = 1 + self._unchanged.needed(question.prompt)
                if self.calls + needed > self.limit:
                    break
                self.calls += needed
                self._unchanged.count(question.prompt)
                admitted[question] = self.calls
            self._open += len(admitted)
            refused = list(questions[len(admitted) :])
            self.refused = self.refused or bool(refused)
        return admitted, refused

    def _respond(self, instruction: str, prompts: Sequence[Prompt], keys: Sequence[str]) -> dict[str, Answer]:
        """Ask the target, and keep its answers."""
        environment = InstructionEnvironment(template(instruction), self._target, self._reward)
        seeds = [derive_seed(self._seed, "rival", prompt.id, key) for prompt, key in zip(prompts, keys, strict=True)]
        chains = environment.rollout(self._engine, prompts, self._params, seeds)
        scores = environment.score(prompts, chains)
        found = dict[str, Answer]()
        for i, key in enumerate(keys):
            (response,) = chains[i][0].responses
            found[key] = Answer(scores.responses[i][0][0], len(response.tokens), scores.values[i, 0].item())
            self._answers.add(key, found[key])
        return found


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
