"""The target behind an endpoint: rewrites are sent as text, and answers come as text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from alignpro.config import TargetEndpointConfig
from alignpro.data import Message, Prompt, replace_lone_surrogates
from alignpro.endpoints.types import Answer, Query, Sampling
from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed
from alignpro.errors import AlignProError, BudgetError, ConfigError, DataError
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.reasoning import without_reasoning
from alignpro.prompting.target_prompt import SentRewrite, text_to_send
from alignpro.targets.base import Answered, BegunRollout, OnAnswers
from alignpro.targets.completion import TextCompletion
from alignpro.targets.connection import Connection
from alignpro.targets.server_metrics import ServerMetrics

logger = logging.getLogger(__name__)

_ONE_TEXT = "completions are of one text; use api: chat, or prompts of a single turn"


@dataclass(frozen=True)
class Conversation(SentRewrite):
    """A rewrite as a server receives it."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) of each turn."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """None: only the server knows them."""
        return ()


@dataclass
class _Asked:
    """A rewrite, and the answers to it that are awaited; or why there can be none."""

    sent: Conversation | None = None
    query: Query | None = None
    answers: Future[list[Answer]] | None = None
    told: Future[None] | None = None
    """Ends once the answers have been told of, if somebody is told."""
    problem: str = ""


class RemoteTarget:
    """A target behind a server.

    A rewrite is sent as soon as it ends, while others are still sampled. The server gets the conversation of the prompt
    with x' as its last turn, inside the configured wrapper, below the configured system message.

    Args:
        connection: The server's model.
        config: System message, wrapper, and the values of answers that depend on content.
        on_empty: What is sent for an empty rewrite, as for `TargetTemplate`.

    Raises:
        ConfigError: The wrapper is no template, or does not write the rewrite.
    """

    remote = True

    def __init__(
        self, connection: Connection, config: TargetEndpointConfig, on_empty: Literal["send", "original"] = "send"
    ) -> None:
        self.connection, self.config, self.on_empty = connection, config, on_empty
        self._name = f"{config.model} at {config.base_url}"
        self._wrap = compile_wrapper(config.wrapper)
        self._measure = ServerMetrics(connection, self._name)

    @property
    def models(self) -> Mapping[str, LanguageModel]:
        """None: the server has it."""
        return {}

    def answerable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """All prompts: only the server knows what fits in its context, and a rewrite that does not fit is an outcome.

        A server of plain completions gets one text, so prompts with earlier turns are left out.
        """
        kept = [prompt for prompt in prompts if not self._loses_turns(prompt)]
        left_out = [prompt for prompt in prompts if self._loses_turns(prompt)]
        if left_out:
            first = left_out[0].source or left_out[0].id
            told = f"{len(left_out)} of {len(prompts)} prompts have turns before the last one (the first: {first})"
            if not kept:
                raise DataError(f"no prompt is left: {told}, which {self._name} does not get: {_ONE_TEXT}")
            logger.warning("%s, which %s does not get: they were dropped; %s", told, self._name, _ONE_TEXT)
        return kept

    def encode(self, prompt: Prompt, rewrite: str | None) -> Conversation:
        """The conversation that the server gets.

        Raises:
            DataError: It has earlier turns, and the server gets one text.
        """
        if self._loses_turns(prompt):
            raise DataError(
                f"prompt {prompt.source or prompt.id}: {self._name} does not get the turns before the last one: {_ONE_TEXT}"
            )
        text, empty = (prompt.text, False) if rewrite is None else text_to_send(prompt, rewrite, self.on_empty)
        context = prompt.context
        if self.config.system is not None and not any(message.role == "system" for message in context):
            context = (Message("system", self.config.system), *context)
        turns = (*context, Message("user", self._wrap(text)))
        messages = tuple((turn.role, replace_lone_surrogates(turn.content)) for turn in turns)
        return Conversation(text, empty, 0, messages)

    def begin_rollout(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        inputs: Sequence[Sequence[int]],
        *,
        decode: Callable[[Prompt, Completion], str],
        rewrite: SamplingParams,
        respond: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
        on_answered: Answered | None = None,
    ) -> BegunRollout:
        """Sample rewrites on the engine, and send each as soon as it ends; what is returned awaits the answers.

        Raises:
            EndpointError: The server has failed for good.
            BudgetError: An answer could exceed the budget. What has been answered is in the ledger.
        """
        asked: dict[tuple[int, int], tuple[Completion, _Asked]] = {}

        def ask(i: int, k: int, sample: Completion) -> None:
            asked[i, k] = sample, _Asked(problem=f"there is no sample to respond to: {sample.error}")
            if sample.error is None:
                try:
                    text = decode(prompts[i], sample)
                    sent = self.encode(prompts[i], text)
                except AlignProError as error:
                    asked[i, k] = sample, _Asked(problem=f"the sample cannot be given to the target: {error}")
                    return
                query = _query(sent, respond, derive_seed(seeds[i], "respond", k))
                tell = None if on_answered is None else partial(on_answered, i, text)
                asked[i, k] = sample, self._ask(sent, query, tell)

        def collect() -> list[list[Chain]]:
            self._await([each for _, each in asked.values()])
            groups: list[list[Chain]] = [[] for _ in prompts]
            for i, k in sorted(asked):
                sample, each = asked[i, k]
                if each.answers is None:
                    responses: list[Completion] = [Completion([], [], "error", each.problem) for _ in range(respond.n)]
                else:
                    responses = self._completions(each.answers)
                groups[i].append(Chain(sample, each.sent, responses))
            return groups

        if drawn is None:
            samples = engine.generate("policy", inputs, rewrite, seeds, on_completion=ask)
            return BegunRollout(samples, collect)
        for i, group in enumerate(drawn):
            for k, sample in enumerate(group):
                ask(i, k, sample)
        return BegunRollout(drawn, collect)

    def respond(
        self,
        engine: Engine,
        sent: Sequence[SentRewrite],
        params: SamplingParams,
        seeds: Sequence[int],
        on_answered: OnAnswers | None = None,
    ) -> list[list[Completion]]:
        """Ask for responses to conversations; the engine is not used."""
        conversations = [each for each in sent if isinstance(each, Conversation)]
        asked = [
            self._ask(each, _query(each, params, seed), None if on_answered is None else partial(on_answered, i))
            for i, (each, seed) in enumerate(zip(conversations, seeds, strict=True))
        ]
        self._await(asked)
        return [self._completions(each.answers) for each in asked if each.answers is not None]

    def text(self, completion: Completion) -> str:
        """The text of a response."""
        assert isinstance(completion, TextCompletion)  # because this target made it
        return completion.text

    def describe_change(self) -> str | None:
        """Which other model began to answer, if one did."""
        return self._measure.change

    def metrics(self) -> dict[str, float]:
        """What was asked and spent since the last call."""
        return self._measure()

    def state_dict(self) -> dict[str, Any]:
        """Which model has answered."""
        return self._measure.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore which model has answered."""
        self._measure.load_state_dict(state)

    def _ask(self, sent: Conversation, query: Query, tell: Callable[[Sequence[Completion]], None] | None) -> _Asked:
        """Send a rewrite; ``tell`` gets the responses as soon as they are there, in the connection's thread."""
        answers = self.connection.submit(query)
        if tell is None:
            return _Asked(sent, query, answers)
        told: Future[None] = Future()

        def answered(answers: Future[list[Answer]]) -> None:
            try:
                if answers.exception() is None:
                    tell([self._completion(answer) for answer in answers.result()])
            except BaseException as error:  # whoever waits must learn of it
                told.set_exception(error)
            else:
                told.set_result(None)

        answers.add_done_callback(answered)
        return _Asked(sent, query, answers, told)

    def _loses_turns(self, prompt: Prompt) -> bool:
        return self.config.api == "completions" and bool(prompt.context)

    def _await(self, asked: Sequence[_Asked]) -> None:
        """Wait for all answers, even if some fail: those that come are paid for, and in the ledger."""
        futures = [each.answers for each in asked if each.answers is not None]
        told = [each.told for each in asked if each.told is not None]
        started = perf_counter()
        wait(futures)
        wait(told)
        self._measure.seconds += perf_counter() - started
        for each in told:
            each.result()
        errors = [error for each in futures if (error := each.exception()) is not None]
        for error in errors:
            if not isinstance(error, BudgetError):  # such as a server that has failed
                raise error
        if errors:
            left = [each.query for each in asked if each.query and each.answers and each.answers.exception()]
            raise BudgetError(
                f"{errors[0]}; {len(futures) - len(left)} of {len(futures)} rewrites have been answered and are kept, and "
                f"the others take at most {self.connection.describe_most(left)}: raise the budget and "
                "continue (a training with --resume)"
            )

    def _completions(self, asked: Future[list[Answer]]) -> list[Completion]:
        answers = asked.result()
        self._measure.add(answers)
        return [self._completion(answer) for answer in answers]

    def _completion(self, answer: Answer) -> Completion:
        if answer.finish_reason == "filtered" or answer.finish_reason == "overflow":
            return self._outcome(answer.finish_reason)
        text = without_reasoning(answer.text, None).strip()
        return TextCompletion([], [], answer.finish_reason, text=text)

    def _outcome(self, outcome: Literal["filtered", "overflow"]) -> Completion:
        value = self.config.filtered_reward if outcome == "filtered" else self.config.overflow_reward
        if value is not None:
            return TextCompletion([], [], "stop", outcome=outcome, value=value)
        what, key = _OUTCOMES[outcome]
        return Completion(
            [],
            [],
            "error",
            f"{what} {self._name}: leaving it out would bias the gradient; set the value "
            f"that such a rewrite has, target.endpoint.{key}, or leave the prompt out",
        )


def _query(sent: Conversation, params: SamplingParams, seed: int) -> Query:
    sampling = Sampling(
        params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p, tuple(params.stop)
    )
    # The seeds of the engine's own sequences: a server that samples as it does gives the same answers.
    return Query(sent.messages, sampling, seed, tuple(derive_seed(seed, m) for m in range(params.n)))


_OUTCOMES = {
    "filtered": ("a response was refused by the content filter of", "filtered_reward"),
    "overflow": ("a rewrite does not fit in the context of", "overflow_reward"),
}


def compile_wrapper(source: str | None) -> Callable[[str], str]:
    """Return what puts a rewrite into a Jinja template with the variable ``rewrite``.

    Raises:
        ConfigError: It is no template, or does not write the rewrite as it is.
    """
    if source is None:
        return lambda text: text
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    probe = '<probe> & "it\'s" {{ {} }}'
    try:
        template = environment.from_string(source)
        rendered = template.render(rewrite=probe)
    except TemplateError as error:
        raise ConfigError(f"target.endpoint.wrapper: {error}: it is a template with the variable rewrite") from error
    if probe not in rendered:
        raise ConfigError(
            f"target.endpoint.wrapper: {source!r} does not write the rewrite as it is: it needs {{{{ rewrite }}}}"
        )
    return lambda text: template.render(rewrite=text)
