"""A language model behind a server as a judge: it grades a response, or compares it with a reference in both orders.

Equal questions get equal answers: at temperature 0 they are the same request, and otherwise the draw follows from the text of
the question and the attempt. So what the ledger holds is not paid again, and r*(x, y) depends on nothing but x, x' and y.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from alignpro.config import JudgeRewardConfig
from alignpro.data import Prompt, replace_lone_surrogates
from alignpro.endpoints.types import Answer, Query, Sampling
from alignpro.errors import ConfigError, RewardError
from alignpro.rewards.component import ConcurrentReward, Measurement, describe_prompt, server_errors_named
from alignpro.rewards.rubric import Rubric
from alignpro.rewards.servers import Server, Session, gather
from alignpro.rewards.verdict import UnreadableAnswerError, parse_preference, parse_score

_FIELDS = ("response", "chosen", "rejected", "rewrite")
"""Columns of the data that are fields of `Prompt`; all others are in its metadata."""
_WINS = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass(frozen=True)
class Judgement:
    """What a judge says to one question."""

    value: float | None
    """The score; or 1 if A is better, 0 if B is, 0.5 for a tie. None: it gave no answer that could be read."""
    attempts: int
    problem: str = ""
    """Why there is no value."""


class Questions:
    """What a judge is asked about a response, without anybody to ask: enough to check the configuration and the data.

    Raises:
        ConfigError: The rubric cannot be used.
    """

    needs_columns: bool

    def __init__(self, config: JudgeRewardConfig) -> None:
        self.name = config.name or "judge"
        self.what = f"reward {self.name!r}"
        self.needs_columns = config.reference is not None
        self._config = config
        scale = (config.low, config.high)
        self.rubric = Rubric(config.mode, config.rubric, self.what, criteria=config.criteria, scale=scale)

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Check that each prompt has a reference, if there is to be one, and that the rubric can be rendered.

        Raises:
            ConfigError: A prompt has none; the message names the first.
            RewardError: The rubric fails.
        """
        name = self._config.reference
        if name is not None and (without := [prompt for prompt in prompts if self._reference(prompt) is None]):
            columns = ", ".join(_columns(prompts)) or "none"
            map_it = f"data.columns.{name}" if name in _FIELDS else f"data.columns.metadata.{name}"
            raise ConfigError(
                f"{self.what}: {len(without)} of {len(prompts)} prompts have no text in the column {name!r}, which `reference` "
                f"names (columns: {columns}): name another, or map one with {map_it}; the first is "
                f"{describe_prompt(without[0])}"
            )
        for prompt in prompts[:1]:
            self.about(prompt, "a response", "a rewrite")

    def about(self, prompt: Prompt, response: str, rewrite: str | None) -> list[str]:
        """The questions about a response: one, or for a comparison two, in which it is A and B.

        Raises:
            RewardError: The prompt has no reference, or the rubric fails.
        """
        reference = self._reference(prompt)
        if self._config.reference is not None and reference is None:
            raise RewardError(
                f"{self.what}: no text in the column {self._config.reference!r} to compare with\n  for {describe_prompt(prompt)}"
            )
        if self._config.mode == "score":
            return [self.rubric.render(prompt, rewrite, response=response, reference=reference)]
        return [
            self.rubric.render(prompt, rewrite, response_a=first, response_b=second)
            for first, second in ((response, reference), (reference, response))
        ]

    def _reference(self, prompt: Prompt) -> str | None:
        """The reference of a prompt; a number or a truth value of its metadata as the data set writes it."""
        name = self._config.reference
        if name is None:
            return None
        value = getattr(prompt, name) if name in _FIELDS else prompt.metadata.get(name)
        if isinstance(value, bool | int | float):
            return json.dumps(value)
        return value if isinstance(value, str) else None


class JudgeReward(ConcurrentReward):
    """Reward component: what a judge says, by a rubric.

    Args:
        config: The judge.
        session: Connects to its server.

    Raises:
        ConfigError: The rubric cannot be used.
        EndpointError: The server cannot be used as configured.
    """

    by_row = True

    def __init__(self, config: JudgeRewardConfig, session: Session) -> None:
        self._questions = Questions(config)
        self.name = self._questions.name
        self._config = config
        with server_errors_named(self._questions.what):
            # One draw at a time is asked for, so it need not be found out whether n are answered.
            self._endpoint: Server = session.endpoint(config.endpoint.model_copy(update={"n": False}))

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All prompts; see `Questions.check_columns`."""
        self._questions.check_columns(prompts)
        return list(prompts)

    def preflight(self) -> None:
        """Check that the server can be asked; takes a few small requests.

        Raises:
            EndpointError: It cannot.
            BudgetError: The requests could exceed the budget.
        """
        with server_errors_named(self._questions.what):
            self._endpoint.preflight(Sampling(self._config.max_tokens, self._config.temperature))

    async def measure(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None
    ) -> Measurement:
        """Judge (N,) responses; each question is asked once, however often it occurs.

        The metric ``attempts`` is how many answers the judge took. Of a comparison, the value is the share of both orders in
        which the response is preferred, a tie counting half; the metric ``consistent`` is 1 where both orders agree, and
        ``first`` the share of them in which the response that comes first is preferred.

        Raises:
            RewardError: The judge gave no answer that can be read, and may not abstain.
        """
        rewritten: Sequence[str | None] = rewrites if rewrites is not None else [None] * len(prompts)
        asked = [
            self._questions.about(prompt, response, rewrite)
            for prompt, response, rewrite in zip(prompts, responses, rewritten, strict=True)
        ]
        distinct = {question: prompt for prompt, each in zip(prompts, asked, strict=True) for question in each}
        judgements = await gather(self._judge(question, prompt) for question, prompt in distinct.items())
        by_question = dict(zip(distinct, judgements, strict=True))
        return self._measurement([[by_question[question] for question in each] for each in asked])

    def _measurement(self, rows: Sequence[Sequence[Judgement]]) -> Measurement:
        metrics: dict[str, list[float | None]] = {
            "attempts": [float(sum(each.attempts for each in row)) for row in rows]
        }
        if self._config.mode == "score":
            return Measurement([row[0].value for row in rows], metrics)
        pairs = [
            None if first.value is None or second.value is None else (first.value, second.value)
            for first, second in rows
        ]
        metrics["consistent"] = [None if pair is None else float(sum(pair) == 1) for pair in pairs]
        metrics["first"] = [None if pair is None else sum(pair) / 2 for pair in pairs]
        return Measurement([None if pair is None else (pair[0] + 1 - pair[1]) / 2 for pair in pairs], metrics)

    async def _judge(self, question: str, prompt: Prompt) -> Judgement:
        problem = ""
        for attempt in range(self._config.attempts):
            answer = await self._draw(question, attempt)
            if answer.finish_reason in ("filtered", "overflow"):
                cause = (
                    "content filter refused it" if answer.finish_reason == "filtered" else "context is too short for it"
                )
                return self._failed(Judgement(None, attempt + 1, f"the server's {cause}"), prompt)
            try:
                return Judgement(self._read(answer), attempt + 1)
            except UnreadableAnswerError as error:
                problem = str(error)
        times = f"{self._config.attempts} times" if self._config.attempts > 1 else "once"
        return self._failed(
            Judgement(None, self._config.attempts, f"no answer can be read, asked {times}: {problem}"), prompt
        )

    def _read(self, answer: Answer) -> float:
        if answer.finish_reason == "length":  # what is cut off may be the second digit of a score
            raise UnreadableAnswerError(f"it was cut off at max_tokens={self._config.max_tokens}")
        if self._config.mode == "score":
            return parse_score(answer.text, self._config.low, self._config.high)
        return _WINS[parse_preference(answer.text)]

    def _failed(self, judgement: Judgement, prompt: Prompt) -> Judgement:
        if self._config.on_error == "stop":
            raise RewardError(
                f"{self._questions.what}: {judgement.problem}; use another judge or rubric, or set on_error: abstain to leave "
                f"such responses out\n  for {describe_prompt(prompt)}"
            )
        return judgement

    async def _draw(self, question: str, attempt: int) -> Answer:
        config = self._config
        query = judge_query(
            question, attempt, system=config.system, temperature=config.temperature, max_tokens=config.max_tokens
        )
        (answer,) = await asyncio.wrap_future(self._endpoint.submit(query))
        return answer


def judge_query(question: str, attempt: int, *, system: str | None, temperature: float, max_tokens: int) -> Query:
    """What a judge is asked: equal for equal questions and attempts, so that the ledger knows it.

    Args:
        question: The rendered rubric.
        attempt: From 0; a further one is drawn at temperature 1 if ``temperature`` is 0, since a greedy answer would not
            change, however often it is asked for.
        system: A system message.
        temperature: Of the first attempt.
        max_tokens: Of the answer.
    """
    turns = [*([("system", system)] if system else []), ("user", replace_lone_surrogates(question))]
    draw = _draw_of(turns, attempt)
    sampling = Sampling(max_tokens, temperature if attempt == 0 else temperature or 1.0)
    return Query(tuple(turns), sampling, draw, (draw,))


def _draw_of(turns: Sequence[tuple[str, str]], attempt: int) -> int:
    """63 bits that follow from the question and the attempt."""
    digest = hashlib.sha256(json.dumps([turns, attempt]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _columns(prompts: Sequence[Prompt]) -> list[str]:
    """The columns that any of these prompts has a text in."""
    fields = [name for name in _FIELDS if any(getattr(prompt, name) is not None for prompt in prompts)]
    return [*fields, *dict.fromkeys(name for prompt in prompts for name in prompt.metadata)]
