"""Judges that compare two responses: what they are asked, wherever they run, and how their answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Protocol

from alignpro.config import EngineConfig, JudgeModelConfig, JudgingConfig, ModelConfig, SamplingConfig
from alignpro.data import Message, Prompt
from alignpro.endpoints.types import Answer, Query, Sampling
from alignpro.engine import Engine, SamplingParams
from alignpro.errors import EndpointError, ModelError
from alignpro.models.input_room import max_input_tokens
from alignpro.models.loading import load_language_model
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.reasoning import without_reasoning
from alignpro.rewards.judge import judge_query
from alignpro.rewards.rubric import Rubric
from alignpro.rewards.servers import Server, Session
from alignpro.rewards.verdict import Preference, UnreadableAnswerError, parse_preference


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which the first is that of the arm that the comparison is about."""

    prompt: Prompt
    ours: str
    other: str
    cluster: int
    """The number of the prompt's cluster."""

    @property
    def longer(self) -> int:
        """By how many characters ours is longer."""
        return len(self.ours) - len(self.other)


@dataclass(frozen=True)
class PairVerdict:
    """What a judge says of a pair in both orders."""

    first: Preference | None
    """Where ours is response A; None if no answer could be read."""
    second: Preference | None
    """Where ours is response B."""
    problem: str = ""
    """Why one of them is missing."""


class Judge(Protocol):
    """A language model that answers questions."""

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer to each query, which has one draw.

        Raises:
            EndpointError: Its server cannot be used, or another model began to answer.
            BudgetError: An answer could exceed the budget.
        """

    @property
    def model(self) -> str:
        """The model that answers, as far as it is known."""


class ServedJudge:
    """A judge behind a server, which must stay the same model: verdicts of two models are not those of one judge.

    Args:
        server: The server.
        what: The judge in messages.
    """

    def __init__(self, server: Server, what: str) -> None:
        self._server, self._what = server, what
        self.model = ""

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Ask for all answers at once. Those that come are paid for and in the ledger, even if another one fails."""
        futures = [self._server.submit(query) for query in queries]
        wait(futures)
        answers = [answer for future in futures for answer in future.result()]
        for answer in answers:
            self.model = self.model or answer.model
            if answer.model and answer.model != self.model:
                raise EndpointError(
                    f"{self._what}: the server now answers as {answer.model}, and did as {self.model}: verdicts of two models "
                    "are not those of one judge; name a model that stays the same, then judge again"
                )
        return [
            Answer(without_reasoning(each.text, None), each.finish_reason, model=each.model, replayed=each.replayed)
            for each in answers
        ]


class LocalJudge:
    """A judge of this process, on the engine.

    Args:
        config: The model.
        engine: Sizes of its engine.
        max_tokens: Of an answer.

    Raises:
        ModelError: The model cannot be loaded, or has no chat template.
        ConfigError: Its context has no room for a question.
    """

    def __init__(self, config: ModelConfig, engine: EngineConfig, max_tokens: int) -> None:
        loaded = load_language_model(config)
        self.model = config.path
        self._template = ChatTemplate(loaded.tokenizer, config.chat_template, stop_token_ids=loaded.end_token_ids)
        self._room = max_input_tokens(loaded, SamplingConfig(max_tokens=max_tokens), "the judge", "judge")
        self._engine = Engine({"policy": loaded}, **engine.model_dump())

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Sample all answers; a question that does not fit in the context has none.

        Raises:
            DataError: The model's template refuses the conversation, such as one with a system message.
            ModelError: A sequence cannot be sampled.
        """
        answers = [Answer("", "overflow", model=self.model) for _ in queries]
        encoded = [self._template.encode([Message(*turn) for turn in query.messages]) for query in queries]
        inputs = {i: ids for i, ids in enumerate(encoded) if len(ids) <= self._room}
        by_sampling: dict[Sampling, list[int]] = {}
        for i in inputs:
            by_sampling.setdefault(queries[i].sampling, []).append(i)
        for sampling, places in by_sampling.items():
            params = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                stop_token_ids=self._template.stop_token_ids,
            )
            groups = self._engine.generate(
                "policy", [inputs[i] for i in places], params, [queries[i].seed for i in places]
            )
            for i, (sample,) in zip(places, groups, strict=True):
                if sample.error is not None:
                    raise ModelError(f"judge {self.model}: {sample.error}")
                text = self._template.decode(sample.text_tokens)
                answers[i] = Answer(text, "stop" if sample.finish_reason == "stop" else "length", model=self.model)
        return answers


def open_judge(config: JudgeModelConfig, judging: JudgingConfig, engine: EngineConfig, session: Session) -> Judge:
    """Load a judge, or connect to its server and check it with a few small requests.

    Raises:
        EndpointError: The server cannot be used.
        BudgetError: The check could exceed the budget.
        ModelError: The model cannot be loaded.
    """
    if config.endpoint is None:
        assert config.model is not None  # the configuration requires one of both
        return LocalJudge(config.model, engine, judging.max_tokens)
    # One draw at a time is asked for, so it need not be found out whether n are answered.
    server = session.endpoint(config.endpoint.model_copy(update={"n": False}))
    server.preflight(Sampling(judging.max_tokens, judging.temperature))
    return ServedJudge(server, f"judge {config.label!r} at {config.endpoint.base_url}")


def judge_pairs(judge: Judge, rubric: Rubric, judging: JudgingConfig, pairs: Sequence[Pair]) -> list[PairVerdict]:
    """Ask a judge about pairs, each in both orders; a question whose answer cannot be read is asked again.

    Equal questions are asked once.

    Raises:
        RewardError: The rubric fails on a prompt.
        EndpointError: As `Judge.answer`.
        BudgetError: As `Judge.answer`.
    """
    asked = [
        [rubric.render(pair.prompt, None, response_a=a, response_b=b) for a, b in ((p, q), (q, p))]
        for pair in pairs
        for p, q in [(pair.ours, pair.other)]
    ]
    verdicts: dict[str, Preference] = {}
    problems: dict[str, str] = {}
    left = list(dict.fromkeys(question for both in asked for question in both))
    for attempt in range(judging.attempts):
        queries = [
            judge_query(
                question,
                attempt,
                system=judging.system,
                temperature=judging.temperature,
                max_tokens=judging.max_tokens,
            )
            for question in left
        ]
        again = []
        for question, answer in zip(left, judge.answer(queries), strict=True):
            try:
                verdicts[question] = _read(answer)
            except UnreadableAnswerError as error:
                problems[question] = str(error)
                if answer.finish_reason in ("stop", "length"):  # the others would be refused again
                    again.append(question)
        left = again
        if not left:
            break
    return [_pair_verdict(both, verdicts, problems) for both in asked]


def _read(answer: Answer) -> Preference:
    match answer.finish_reason:
        case "filtered":
            raise UnreadableAnswerError("the server's content filter refused it")
        case "overflow":
            raise UnreadableAnswerError("the question does not fit in the judge's context")
        case "length":
            raise UnreadableAnswerError("the answer was cut off at judge.max_tokens")
    return parse_preference(answer.text)


def _pair_verdict(both: Sequence[str], verdicts: dict[str, Preference], problems: dict[str, str]) -> PairVerdict:
    first, second = (verdicts.get(question) for question in both)
    missing = [problems[question] for question in both if question not in verdicts]
    return PairVerdict(first, second, missing[0] if missing else "")
