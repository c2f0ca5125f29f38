"""A target behind a server: what is sent and when, and what becomes of the answers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from scripted_server import Reply, ScriptedConnection, shout
from tiny_models import tiny_language_model

from alignpro.config import PromptingConfig, SamplingConfig, TargetEndpointConfig
from alignpro.data import Message, Prompt
from alignpro.endpoints.types import Answer, Query
from alignpro.engine import Engine, SamplingParams, derive_seed
from alignpro.environments.base import Scores
from alignpro.environments.build import prompt_environment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.errors import BudgetError, ConfigError, DataError, EndpointError, TrainingError
from alignpro.models.language_model import LanguageModel
from alignpro.rewards import Measurement, RewardStack
from alignpro.targets.completion import TextCompletion
from alignpro.targets.remote import Conversation, RemoteTarget

PROMPTS = [Prompt.from_text("add one and two"), Prompt.from_text("name a river", system="Be kind.")]
SEEDS = [derive_seed(5, 0, i) for i in range(2)]


def endpoint(**settings: Any) -> TargetEndpointConfig:
    return TargetEndpointConfig(base_url="http://127.0.0.1:1/v1", model="big", **settings)


def target(reply: Reply = shout, on_empty: Any = "send", **settings: Any) -> RemoteTarget:
    return RemoteTarget(ScriptedConnection(reply), endpoint(**settings), on_empty)


class Length:
    """Scores a response by its length, and remembers what it was given."""

    name = "length"

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None = None
    ) -> Measurement:
        self.given += responses
        return Measurement([float(len(response)) for response in responses])


@pytest.fixture(scope="module")
def prompter() -> LanguageModel:
    return tiny_language_model("qwen2")


def environment(prompter: LanguageModel, answering: RemoteTarget, responses: int = 2) -> PromptEnvironment:
    sampling = SamplingConfig(max_tokens=6, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, stop=("end",))
    reward = RewardStack([(1.0, Length())], [])
    return prompt_environment(prompter, answering, reward, PromptingConfig(), sampling, responses=responses)


def scored(prompter: LanguageModel, answering: RemoteTarget, responses: int = 2) -> Scores:
    made = environment(prompter, answering, responses)
    engine = Engine({"policy": prompter})
    chains = made.rollout(engine, PROMPTS, SamplingParams(n=3, max_tokens=5), SEEDS)
    return made.score(PROMPTS, chains)


# -------------------------------------------------------------------------------------------------------- what is sent


def test_the_conversation_has_the_rewrite_as_its_last_turn() -> None:
    dialogue = Prompt((Message("user", "hello"), Message("assistant", "hi"), Message("user", "tell me")))
    assert target().encode(dialogue, "say it").messages == (("user", "hello"), ("assistant", "hi"), ("user", "say it"))
    assert target().encode(dialogue, None).messages[-1] == ("user", "tell me")


def test_a_system_message_is_for_prompts_without_one() -> None:
    answering = target(system="Be brief.")
    assert [answering.encode(prompt, "x").messages[0] for prompt in PROMPTS] == [
        ("system", "Be brief."),
        ("system", "Be kind."),
    ]


def test_the_wrapper_embeds_the_text_and_is_the_only_template() -> None:
    answering = target(wrapper="Question: {{ rewrite }}\nAnswer in JSON.\n")
    sent = answering.encode(PROMPTS[0], "{{ 7 * 7 }} <b>")
    assert sent.messages == (("user", "Question: {{ 7 * 7 }} <b>\nAnswer in JSON.\n"),)
    assert sent.text == "{{ 7 * 7 }} <b>"


@pytest.mark.parametrize(
    ("wrapper", "problem"),
    [
        ("Question: {{ rewrite", "target.endpoint.wrapper: unexpected end"),
        ("{{ text }}", "'text' is undefined"),
        ("no place", "does not write the rewrite"),
        ("{{ rewrite.__class__.__mro__ }} {{ rewrite }}", "access to attribute '__class__'"),
    ],
)
def test_a_wrapper_that_cannot_be_used_is_refused(wrapper: str, problem: str) -> None:
    with pytest.raises(ConfigError, match="wrapper") as caught:
        target(wrapper=wrapper)
    assert problem in str(caught.value)


def test_an_empty_rewrite_is_sent_or_replaced() -> None:
    assert target().encode(PROMPTS[0], " \n").messages == (("user", ""),)
    sent = target(on_empty="original").encode(PROMPTS[0], " \n")
    assert (sent.messages, sent.empty) == ((("user", PROMPTS[0].text),), True)


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert target().encode(PROMPTS[0], "a\ud800").messages == (("user", "a\ufffd"),)


def test_turns_that_a_server_of_completions_would_not_get_are_not_dropped_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answering = target(api="completions", wrapper="Q: {{ rewrite }}\nA:")
    assert answering.encode(PROMPTS[0], "add").messages == (("user", "Q: add\nA:"),)
    assert answering.answerable(PROMPTS) == PROMPTS[:1]
    assert "1 of 2 prompts have turns before the last one" in caplog.text and "api: chat" in caplog.text
    with pytest.raises(DataError, match="no prompt is left: 1 of 1 prompts have turns"):
        answering.answerable(PROMPTS[1:])
    with pytest.raises(DataError, match="does not get the turns before the last one"):
        answering.encode(PROMPTS[1], "river")
    assert target().answerable(PROMPTS) == PROMPTS


def test_a_rewrite_is_asked_with_the_seeds_of_the_engine(prompter: LanguageModel) -> None:
    answering = target()
    scored(prompter, answering)
    connection = answering.connection
    assert isinstance(connection, ScriptedConnection)
    seeds = {derive_seed(seed, "respond", k) for seed in SEEDS for k in range(3)}
    assert {query.seed for query in connection.queries} == seeds
    for query in connection.queries:
        assert query.draws == tuple(derive_seed(query.seed, m) for m in range(2))
        assert (query.sampling.max_tokens, query.sampling.temperature, query.sampling.top_p) == (6, 0.7, 0.9)
        assert (query.sampling.top_k, query.sampling.min_p, query.sampling.stop) == (5, 0.1, ("end",))


def test_a_finished_rewrite_is_sent_while_others_are_sampled(prompter: LanguageModel) -> None:
    answering = target()
    connection = answering.connection
    assert isinstance(connection, ScriptedConnection)
    engine = Engine({"policy": prompter}, max_batch=2)  # so that the last rewrites begin when the first have ended
    computed: list[int] = []
    connection.watch = lambda: computed.append(engine.stats.computed.total())
    made = environment(prompter, answering)
    made.rollout(engine, PROMPTS, SamplingParams(n=3, max_tokens=5), SEEDS)
    assert computed == sorted(computed)
    assert computed[0] < computed[-1] <= engine.stats.computed.total()


def test_responses_are_in_order_and_stripped(prompter: LanguageModel) -> None:
    answering = target(lambda query: [Answer(f" <think>hm</think> {draw} \n", "stop") for draw in query.draws])
    made = environment(prompter, answering)
    chains = made.rollout(Engine({"policy": prompter}), PROMPTS, SamplingParams(n=3, max_tokens=5), SEEDS)
    for seed, group in zip(SEEDS, chains, strict=True):
        for k, chain in enumerate(group):
            draws = [derive_seed(derive_seed(seed, "respond", k), m) for m in range(2)]
            assert [answering.text(y) for y in chain.responses] == [str(draw) for draw in draws]
            assert isinstance(chain.target_prompt, Conversation)
            assert chain.target_tokens == []


# ------------------------------------------------------------------------------------------------- outcomes and failures


def outcome(reason: Any) -> Reply:
    """Every second draw has this outcome."""
    return lambda query: [
        Answer("", reason) if m % 2 else replace(answer, text="four") for m, answer in enumerate(shout(query))
    ]


@pytest.mark.parametrize("reason", ["filtered", "overflow"])
def test_an_outcome_has_its_configured_reward_and_is_counted(reason: str, prompter: LanguageModel) -> None:
    answering = target(outcome(reason), **{f"{reason}_reward": -2.0})
    scores = scored(prompter, answering)
    assert scores.values.unique().tolist() == [1.0]  # the mean of 4 and −2
    assert scores.metrics["reward/length"] == 4.0
    assert scores.metrics["reward/length/abstained"] == 0.5
    metrics = answering.metrics()
    other = {"filtered": "overflow", "overflow": "filtered"}[reason]
    assert (metrics[f"target/{reason}"], metrics[f"target/{other}"]) == (0.5, 0.0)


def test_a_reward_never_sees_an_outcome(prompter: LanguageModel) -> None:
    answering = target(lambda query: [Answer("", "filtered")] * len(query.draws), filtered_reward=0.25)
    made = environment(prompter, answering)
    chains = made.rollout(Engine({"policy": prompter}), PROMPTS, SamplingParams(n=3, max_tokens=5), SEEDS)
    scores = made.score(PROMPTS, chains)
    assert scores.values.unique().tolist() == [0.25]
    assert "reward/length" not in scores.metrics


@pytest.mark.parametrize("reason", ["filtered", "overflow"])
def test_an_outcome_without_a_reward_ends_the_run(reason: str, prompter: LanguageModel) -> None:
    with pytest.raises(TrainingError, match=f"big at http://127.0.0.1:1/v1: .*target.endpoint.{reason}_reward"):
        scored(prompter, target(outcome(reason)))


def test_a_server_that_fails_is_the_cause_even_if_the_budget_is_spent_too(prompter: LanguageModel) -> None:
    errors: list[Exception] = [BudgetError("spent"), EndpointError("down"), *[BudgetError("spent")] * 4]
    answering = target(lambda query: errors.pop(0))
    with pytest.raises(EndpointError, match="down"):
        scored(prompter, answering)
    assert not errors  # all were awaited


def test_a_spent_budget_says_what_was_kept_and_what_is_left(prompter: LanguageModel) -> None:
    count = 0

    def reply(query: Query) -> list[Answer] | Exception:
        nonlocal count
        count += 1
        return shout(query) if count <= 4 else BudgetError("budget.usd=1: $1.00 was spent")

    with pytest.raises(BudgetError, match=r"\$1.00 was spent; 4 of 6 rewrites .* at most 2 requests: .*--resume"):
        scored(prompter, target(reply))


def test_another_model_behind_the_server_is_a_warning(
    prompter: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = "m-1"

    def reply(query: Query) -> list[Answer]:
        return [replace(answer, model=model, fingerprint="fp") for answer in shout(query)]

    answering = target(reply)
    scored(prompter, answering)
    assert answering.metrics()["target/changed"] == 0.0
    saved = answering.state_dict()
    model = "m-2"
    scored(prompter, answering)
    assert answering.metrics()["target/changed"] == 1.0
    told = "is now m-2 with fingerprint fp, and was m-1 with fingerprint fp"
    assert told in (answering.describe_change() or "")
    resumed = target(reply)
    resumed.load_state_dict(saved)
    with caplog.at_level(logging.WARNING):
        scored(prompter, resumed)
    assert resumed.metrics()["target/changed"] == 1.0
    assert told in caplog.text


def test_metrics_count_since_the_last_call(prompter: LanguageModel) -> None:
    answering = target()
    scored(prompter, answering)
    first, second = answering.metrics(), answering.metrics()
    assert (first["endpoint/requests"], first["endpoint/tokens"], first["endpoint/usd"]) == (6, 60, 3.0)
    assert second["endpoint/requests"] == 0
    assert first["seconds/target"] >= 0


def test_a_response_is_a_text_without_tokens() -> None:
    made = TextCompletion([], [], "stop", text="yes")
    assert (made.text_tokens, made.logprobs, made.value) == ([], [], None)
