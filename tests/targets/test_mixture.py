"""Several targets for one prompter: who answers, and that each prompt's chains do not depend on the others."""

from __future__ import annotations

import pytest
from scripted_server import ScriptedConnection
from tiny_models import tiny_language_model

from alignpro.config import ModelConfig, PromptingConfig, SamplingConfig, TargetEndpointConfig
from alignpro.data import Prompt
from alignpro.endpoints.types import Answer
from alignpro.engine import Engine, SamplingParams, derive_seed
from alignpro.environments.build import prompt_environment
from alignpro.models.language_model import LanguageModel
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target
from alignpro.targets.local import LocalTarget
from alignpro.targets.mixture import TargetMixture, WeightedTarget
from alignpro.targets.remote import RemoteTarget

PROMPTS = [Prompt.from_text(f"say {word}") for word in ("one", "two", "three", "four", "five", "six")]
SEEDS = [derive_seed(1, 2, i) for i in range(len(PROMPTS))]
SAMPLING = SamplingConfig(max_tokens=4)


@pytest.fixture(scope="module")
def prompter() -> LanguageModel:
    return tiny_language_model("qwen2")


@pytest.fixture(scope="module")
def local() -> LocalTarget:
    return LocalTarget.build(
        tiny_language_model("llama", seed=3), ModelConfig(path="t"), PromptingConfig(), SAMPLING, "target small"
    )


def remote(answer: str) -> RemoteTarget:
    config = TargetEndpointConfig(base_url="http://127.0.0.1:1/v1", model=answer)
    return RemoteTarget(ScriptedConnection(lambda query: [Answer(answer, "stop")] * len(query.draws)), config)


def mixture(*parts: tuple[str, float, Target]) -> TargetMixture:
    return TargetMixture([WeightedTarget(*part) for part in parts])


def test_prompts_get_targets_by_weight_from_their_seeds() -> None:
    mixed = mixture(("a", 3.0, remote("a")), ("b", 1.0, remote("b")))
    chosen = [mixed.choose(derive_seed(7, step, i)) for step in range(50) for i in range(40)]
    assert sum(chosen) / len(chosen) == pytest.approx(0.25, abs=0.03)
    assert chosen == [mixed.choose(derive_seed(7, step, i)) for step in range(50) for i in range(40)]


def test_each_prompt_is_answered_by_its_target_as_if_alone(prompter: LanguageModel, local: LocalTarget) -> None:
    mixed = mixture(("small", 1.0, local), ("a", 1.0, remote("a")), ("b", 1.0, remote("b")))
    engine = Engine({"policy": prompter, **mixed.models})
    params = SamplingParams(n=2, max_tokens=4)

    def rollout(answering: TargetMixture | LocalTarget, places: range) -> list[list[tuple[list[int], list[str]]]]:
        made = prompt_environment(prompter, answering, RewardStack([], []), PromptingConfig(), SAMPLING, responses=2)
        chains = made.rollout(engine, [PROMPTS[i] for i in places], params, [SEEDS[i] for i in places])
        return [[(c.sample.tokens, [answering.text(y) for y in c.responses]) for c in group] for group in chains]

    together = rollout(mixed, range(len(PROMPTS)))
    alone = rollout(local, range(len(PROMPTS)))
    chosen = [mixed.choose(seed) for seed in SEEDS]
    assert set(chosen) == {0, 1, 2}
    for i, number in enumerate(chosen):
        assert [sample for sample, _ in together[i]] == [sample for sample, _ in alone[i]]
        expected = [text for _, text in alone[i]] if number == 0 else [["ab"[number - 1]] * 2] * 2
        assert [text for _, text in together[i]] == expected


def test_samples_that_are_there_get_the_responses_that_they_got_first(
    prompter: LanguageModel, local: LocalTarget
) -> None:
    mixed = mixture(("small", 1.0, local), ("a", 1.0, remote("a")))
    engine, params = Engine({"policy": prompter, **mixed.models}), SamplingParams(n=2, max_tokens=4)
    made = prompt_environment(prompter, mixed, RewardStack([], []), PromptingConfig(), SAMPLING, responses=2)
    begun = made.begin_rollout(engine, PROMPTS, params, SEEDS)
    again = made.begin_rollout(Engine(dict(mixed.models)), PROMPTS, params, SEEDS, drawn=begun.samples)
    assert again.samples == begun.samples
    assert again() == begun()
    assert {mixed.choose(seed) for seed in SEEDS} == {0, 1}


def test_metrics_are_told_together_and_apart() -> None:
    a, b = remote("a"), remote("b")
    mixed = mixture(("a", 1.0, a), ("b", 1.0, b))
    b.respond(Engine({}), [b.encode(prompt, None) for prompt in PROMPTS], SamplingParams(), SEEDS)
    metrics = mixed.metrics()
    counts = [metrics[f"endpoint/requests{of}"] for of in ("", "/a", "/b")]
    assert counts == [len(PROMPTS), 0, len(PROMPTS)]
