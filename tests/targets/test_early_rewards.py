"""Components of the reward that wait begin with the responses to a rewrite while others are still answered or sampled.

Their results are those of a reward that is asked for after the rollout, bit for bit.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from memory_books import MemoryBooks
from scripted_server import ScriptedConnection, shout
from tenacity import wait_none
from tiny_models import tiny_language_model
from tiny_server import Choice, TinyServer, prompt_of

from alignpro.config import (
    EndpointConfig,
    ModelConfig,
    PromptingConfig,
    RewardConfig,
    SamplingConfig,
    TargetEndpointConfig,
)
from alignpro.data import Prompt
from alignpro.endpoints.session import EndpointSession
from alignpro.endpoints.types import Answer, Query
from alignpro.engine import Chain, Engine, SamplingParams
from alignpro.environments.base import ResponseScores
from alignpro.environments.build import prompt_environment
from alignpro.environments.instruction import InstructionEnvironment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.response import ResponseEnvironment, UnchangedPromptEnvironment
from alignpro.errors import EndpointError, RewardError
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.rewrite_template import RewriteTemplate
from alignpro.rewards import RewardStack, build_reward
from alignpro.targets.base import Responder, Target
from alignpro.targets.local import LocalTarget
from alignpro.targets.mixture import TargetMixture, WeightedTarget
from alignpro.targets.remote import RemoteTarget

PROMPTS = [Prompt.from_text("add one and two", metadata={"level": 1}), Prompt.from_text("name a river")]
SEEDS = [11, 12]
REWRITES = SamplingParams(n=3, max_tokens=5)
RESPOND = SamplingConfig(max_tokens=6)


@dataclass
class Judge:
    """An ``async def`` reward: the number of letters, one call at a time, ``seconds`` each."""

    seconds: float = 0.0
    watch: Callable[[], None] = lambda: None
    calls: list[list[str]] = field(default_factory=list)
    _one: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(
        self, responses: Sequence[str], rewrites: Sequence[str] | None, level: Sequence[Any]
    ) -> list[float]:
        self.calls.append(list(responses))
        self.watch()
        async with self._one:
            await asyncio.sleep(self.seconds)
        return [
            len(y) + 0.1 * len(rewrite) + (of_prompt or 0)
            for y, rewrite, of_prompt in zip(responses, rewrites or responses, level, strict=True)
        ]


def reward(judge: Any, **settings: Any) -> RewardStack:
    component = {"kind": "function", "function": judge, "name": "judge", **settings}
    made = build_reward(RewardConfig(components=[component]))
    assert made.scorable(PROMPTS) == PROMPTS
    return made


class SlowConnection(ScriptedConnection):
    """Answers one query after another, ``seconds`` each, in a thread of its own."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self._thread = seconds, ThreadPoolExecutor(1)

    def submit(self, query: Query) -> Future[list[Answer]]:
        def answer() -> list[Answer]:
            time.sleep(self.seconds)
            return shout(query)

        return self._thread.submit(answer)


@pytest.fixture(scope="module")
def prompter() -> LanguageModel:
    return tiny_language_model("qwen2")


@pytest.fixture(scope="module")
def local() -> LocalTarget:
    return LocalTarget.build(tiny_language_model("llama"), ModelConfig(path="t"), PromptingConfig(), RESPOND, "small")


def remote(connection: ScriptedConnection | None = None) -> RemoteTarget:
    config = TargetEndpointConfig(base_url="http://127.0.0.1:1/v1", model="big", filtered_reward=-1.0)
    return RemoteTarget(connection or ScriptedConnection(sometimes_filtered), config)


def sometimes_filtered(query: Query) -> list[Answer]:
    return [
        Answer("", "filtered") if draw % 3 == 0 else answer
        for draw, answer in zip(query.draws, shout(query), strict=True)
    ]


def mixed(prompter: LanguageModel, local: LocalTarget) -> Responder:
    return TargetMixture([WeightedTarget("a", 1.0, local), WeightedTarget("b", 1.0, remote())])


def chain_environment(prompter: LanguageModel, target: Responder, made: RewardStack) -> PromptEnvironment:
    return prompt_environment(prompter, target, made, PromptingConfig(), RESPOND, responses=2)


def whole_rollout(
    environment: PromptEnvironment | ResponseEnvironment | UnchangedPromptEnvironment | InstructionEnvironment,
    prompter: LanguageModel,
    target: Responder,
    params: SamplingParams = REWRITES,
) -> ResponseScores:
    engine = Engine({"policy": prompter, **target.models}, max_batch=2)  # so that some end before others begin
    return environment.score(PROMPTS, environment.rollout(engine, PROMPTS, params, SEEDS))


def drawn_before(environment: PromptEnvironment, prompter: LanguageModel, target: Responder) -> ResponseScores:
    engine = Engine({"policy": prompter, **target.models}, max_batch=2)
    drawn = engine.generate("policy", [environment.encode(prompt) for prompt in PROMPTS], REWRITES, SEEDS)
    return environment.score(PROMPTS, environment.begin_rollout(engine, PROMPTS, REWRITES, SEEDS, drawn)())


Scored = Callable[[LanguageModel, LocalTarget, RewardStack], ResponseScores]


def _chains(target: Callable[[LanguageModel, LocalTarget], Responder], run: Callable[..., ResponseScores]) -> Scored:
    def scored(prompter: LanguageModel, local: LocalTarget, made: RewardStack) -> ResponseScores:
        answering = target(prompter, local)
        return run(chain_environment(prompter, answering, made), prompter, answering)

    return scored


def _unchanged(target: Callable[[LocalTarget], Target]) -> Scored:
    def scored(prompter: LanguageModel, local: LocalTarget, made: RewardStack) -> ResponseScores:
        answering = target(local)
        return whole_rollout(UnchangedPromptEnvironment(answering, made), prompter, answering)

    return scored


def _instruction(prompter: LanguageModel, local: LocalTarget, made: RewardStack) -> ResponseScores:
    answering = remote()
    template = RewriteTemplate("Please: {{ prompt }}", "instruction")
    return whole_rollout(InstructionEnvironment(template, answering, made), prompter, answering)


def _response(prompter: LanguageModel, local: LocalTarget, made: RewardStack) -> ResponseScores:
    template = ChatTemplate(prompter.tokenizer, stop_token_ids=prompter.end_token_ids)
    return whole_rollout(ResponseEnvironment(template, made), prompter, remote())


KINDS: Mapping[str, tuple[Scored, int]] = {
    "behind a server": (_chains(lambda _, __: remote(), whole_rollout), 6),
    "in process": (_chains(lambda _, local: local, whole_rollout), 6),
    "of both": (_chains(mixed, whole_rollout), 6),
    "drawn before, behind a server": (_chains(lambda _, __: remote(), drawn_before), 6),
    "drawn before, in process": (_chains(lambda _, local: local, drawn_before), 6),
    "unchanged, behind a server": (_unchanged(lambda _: remote()), 2),
    "unchanged, in process": (_unchanged(lambda local: local), 2),
    "instruction": (_instruction, 2),
    "responses of the policy": (_response, 6),
}
"""How samples are scored → that, and how many rewrites, or prompts, are told of."""


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_reward_that_waits_for_all(
    kind: str, prompter: LanguageModel, local: LocalTarget
) -> None:
    scored, told = KINDS[kind]
    early, late = Judge(), Judge()
    began, waited = scored(prompter, local, reward(early)), scored(prompter, local, reward(late, whole_batch=True))
    assert (len(early.calls), len(late.calls)) == (told, 1)
    assert sorted(y for call in early.calls for y in call) == sorted(late.calls[0])
    assert began.values.equal(waited.values) and began.raw.equal(waited.raw)
    assert (began.metrics, began.responses) == (waited.metrics, waited.responses)


def test_a_reward_begins_before_the_last_answer_is_there(prompter: LanguageModel) -> None:
    """Otherwise the last answer, which waits for a reward, would never come."""
    asked, left = threading.Event(), list(range(6))

    def reply(query: Query) -> list[Answer]:
        left.pop()
        assert left or asked.wait(30)
        return shout(query)

    answering = remote(ScriptedConnection(reply))
    scores = whole_rollout(chain_environment(prompter, answering, reward(Judge(watch=asked.set))), prompter, answering)
    assert scores.values.shape == (2, 3)


def test_a_reward_begins_while_a_target_in_process_still_answers(prompter: LanguageModel, local: LocalTarget) -> None:
    judge = Judge()
    environment = chain_environment(prompter, local, reward(judge))
    engine = Engine({"policy": prompter, **local.models}, max_batch=2)
    computed: list[int] = []
    judge.watch = lambda: computed.append(engine.stats.computed.total())
    chains = environment.rollout(engine, PROMPTS, REWRITES, SEEDS)
    environment.score(PROMPTS, chains)
    assert computed[0] < engine.stats.computed.total()


def test_rollout_and_reward_take_the_time_of_the_longer_not_of_both(prompter: LanguageModel) -> None:
    each = 0.06  # 6 rewrites: 0.36 s of answers, and as much of rewards

    def seconds(**settings: Any) -> float:
        answering, made = remote(SlowConnection(each)), reward(Judge(each if not settings else 6 * each), **settings)
        environment = chain_environment(prompter, answering, made)
        began = time.perf_counter()
        whole_rollout(environment, prompter, answering)
        return time.perf_counter() - began

    early = min(seconds() for _ in range(3))  # another process may take the processor for a while
    late = seconds(whole_batch=True)
    assert late > 12 * each
    assert early < late - 3 * each  # 5, since only the last rewrite's reward comes after the last answer


def test_a_function_that_compares_samples_gets_all_of_them(prompter: LanguageModel) -> None:
    async def ranks(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(sorted(responses).index(y)) for y in responses]

    answering = remote(ScriptedConnection(shout))
    scores = whole_rollout(chain_environment(prompter, answering, reward(ranks, whole_batch=True)), prompter, answering)
    assert scores.rewards.max() > 6  # of 12 responses


class OwnScore(PromptEnvironment):
    """Scores something else than what the target answers."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> ResponseScores:
        return super().score(prompts, chains)


def test_an_environment_with_a_score_of_its_own_is_not_anticipated(prompter: LanguageModel) -> None:
    judge, answering = Judge(), remote()
    environment = prompt_environment(
        prompter, answering, reward(judge), PromptingConfig(), RESPOND, responses=2, kind=OwnScore
    )
    whole_rollout(environment, prompter, answering)
    assert len(judge.calls) == 1


# ---------------------------------------------------------------------------------------------------------------- failures


def test_a_reward_that_fails_ends_the_run_with_its_cause(prompter: LanguageModel) -> None:
    async def fails(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        raise EndpointError("http://judge: no credit")

    answering = remote()
    with pytest.raises(EndpointError, match=r"reward 'judge': http://judge: no credit"):
        whole_rollout(chain_environment(prompter, answering, reward(fails)), prompter, answering)
    assert isinstance(answering.connection, ScriptedConnection)
    assert len(answering.connection.queries) == 6  # all that the step asks for is bought, and in the ledger


def test_a_bad_value_names_its_prompt(prompter: LanguageModel) -> None:
    async def bad(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float("nan") if prompts[0] is PROMPTS[1] else 0.0] * len(responses)

    answering = remote()
    with pytest.raises(RewardError, match=r"returned nan(.|\n)*name a river"):
        whole_rollout(chain_environment(prompter, answering, reward(bad)), prompter, answering)


def test_rewards_of_a_rollout_that_fails_are_cancelled(prompter: LanguageModel) -> None:
    cancelled = threading.Event()

    class Endless(Judge):
        async def __call__(
            self, responses: Sequence[str], rewrites: Sequence[str] | None, level: Sequence[Any]
        ) -> list[float]:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return []

    left = list(range(6))

    def reply(query: Query) -> list[Answer] | Exception:
        left.pop()
        return shout(query) if left else EndpointError("down")

    answering = remote(ScriptedConnection(reply))
    with pytest.raises(EndpointError, match="down"):
        whole_rollout(chain_environment(prompter, answering, reward(Endless())), prompter, answering)
    assert cancelled.wait(30)


# ----------------------------------------------------------------------------------------------------------------- servers


def letters(request: Mapping[str, Any], seed: int | None, index: int) -> Choice:
    """A judge that counts the letters of the response."""
    return Choice(f"Score: {1 + len(prompt_of(request).split(' the response')[1].splitlines()[1]) % 9}")


@pytest.mark.parametrize("mode", ["score", "pairwise"])
def test_a_judge_is_asked_early_and_each_question_is_bought_once(prompter: LanguageModel, mode: str) -> None:
    def compare(request: Mapping[str, Any], seed: int | None, index: int) -> Choice:
        return Choice("Verdict: tie") if mode == "pairwise" else letters(request, seed, index)

    results = []
    for kind in (PromptEnvironment, OwnScore):
        books = MemoryBooks()
        with TinyServer(compare) as server, EndpointSession(books, backoff=wait_none()) as session:
            endpoint = EndpointConfig(base_url=server.url, model="tiny", seed=True)
            pair = {"mode": "pairwise", "reference": "level"} if mode == "pairwise" else {}
            config = RewardConfig(components=[{"kind": "judge", "endpoint": endpoint, **pair}])
            made, answering = build_reward(config, session=session), remote(ScriptedConnection(alike))
            prompts = [Prompt.from_text(each.text, metadata={"level": 1}) for each in PROMPTS]
            environment = prompt_environment(
                prompter, answering, made, PromptingConfig(), RESPOND, responses=2, kind=kind
            )
            chains = environment.rollout(Engine({"policy": prompter}), prompts, REWRITES, SEEDS)
            scores = environment.score(prompts, chains)
            assert set(server.computed.values()) == {1} and set(books.bought.values()) == {1}
            results.append((scores.values.tolist(), scores.metrics, {(key.body, key.draw) for key in books.answers}))
        books.check()
    assert results[0] == results[1]


def alike(query: Query) -> list[Answer]:
    """Few different answers, so that questions recur."""
    return [Answer("y" * (1 + draw % 3), "stop") for draw in query.draws]
