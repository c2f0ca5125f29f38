"""Prompts that share a prefix too short for a node: its keys and values are copied instead of recomputed."""

from __future__ import annotations

from typing import Any

import pytest
from checks import PAGE
from tiny_models import ragged, tiny_language_model

from alignpro.engine import Completion, Engine, SamplingParams
from alignpro.engine.prefix_tree import MIN_COPIED_TOKENS, MIN_NODE_TOKENS
from alignpro.models.language_model import LanguageModel

TEMPLATE = ragged(1, 100, shortest=24, longest=24, seed=5)[0]
BEGINNING, *TAILS = ragged(4, 100, shortest=20, longest=20, seed=6)
PARTED = [TEMPLATE + tail for tail in ragged(2, 100, shortest=20, longest=20, seed=7)]
"""Two prompts whose common prefix is the template, so that a node ends there."""
PARAMS = SamplingParams(max_tokens=8, n=2)


def prompts(common: int) -> list[list[int]]:
    """Return three prompts that share the template and ``common`` more tokens."""
    return [TEMPLATE + BEGINNING[:common] + tail for tail in TAILS]


def drawn(groups: list[list[Completion]]) -> list[list[int]]:
    return [one.tokens for group in groups for one in group]


COMMON = [MIN_COPIED_TOKENS - 1, MIN_COPIED_TOKENS, 9, MIN_NODE_TOKENS - 1]
OPTIONS: list[dict[str, Any]] = [{}, {"page_tokens": 3}, {"page_tokens": 64}, {"token_budget": 5}]


@pytest.mark.parametrize(("common", "options"), zip(COMMON, OPTIONS, strict=True))
def test_tokens_that_a_sibling_has_computed_are_copied(
    any_model: LanguageModel, common: int, options: dict[str, Any]
) -> None:
    assert_copied(any_model, common, options)


@pytest.mark.parametrize(("common", "options"), [(c, o) for c in COMMON for o in OPTIONS])
def test_tokens_are_copied_whatever_their_number_and_the_engines_options(
    llama: LanguageModel, common: int, options: dict[str, Any]
) -> None:
    """The options say how pages are used, which is the same for every architecture."""
    assert_copied(llama, common, options)


def assert_copied(model: LanguageModel, common: int, options: dict[str, Any]) -> None:
    engine = Engine({"m": model}, audit=True, **options)
    engine.generate("m", PARTED, PARAMS)
    copied = common if common >= MIN_COPIED_TOKENS else 0
    for i, prompt in enumerate(prompts(common)):
        before = engine.stats.snapshot()
        groups = engine.generate("m", [prompt], PARAMS, [i])
        (alone,) = Engine({"m": model}).generate("m", [prompt], PARAMS, [i])
        assert drawn(groups) == drawn([alone])
        assert groups[0][0].logprobs == pytest.approx(alone[0].logprobs, abs=2e-5)
        there = len(TEMPLATE) + (copied if i else 0)
        taken = engine.stats.since(before)
        assert taken.computed["prefill"] == len(prompt) - there
        assert taken.cache_hit_tokens == PARAMS.n * there


def test_a_prompt_that_is_a_prefix_of_another_is_not_computed(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, audit=True)
    whole, *_ = prompts(0)
    engine.generate("m", [*PARTED, whole], PARAMS)
    before = engine.stats.snapshot()
    groups = engine.generate("m", [whole[:-12]], PARAMS, [3])
    assert drawn(groups) == drawn(Engine({"m": llama}).generate("m", [whole[:-12]], PARAMS, [3]))
    computed = engine.stats.since(before).computed
    assert (computed["prefill"], computed["recompute"]) == (0, 1)  # the last token is recomputed for its hidden state


def test_nothing_is_copied_from_a_sibling_that_is_not_computed_yet(llama: LanguageModel) -> None:
    """Prompts that arrive together enter the tree before any is computed."""
    engine = Engine({"m": llama}, audit=True)
    inputs = [*PARTED, *(TEMPLATE + BEGINNING[: 9 + i] + tail for i, tail in enumerate(TAILS))]
    assert drawn(engine.generate("m", inputs, PARAMS)) == drawn(
        Engine({"m": llama}, page_tokens=5).generate("m", inputs, PARAMS)
    )
    assert engine.stats.computed["prefill"] == len(TEMPLATE) + sum(len(prompt) - len(TEMPLATE) for prompt in inputs)
    # A prompt that is admitted after a sibling was computed copies from it.
    engine = Engine({"m": llama}, token_budget=len(TEMPLATE) + 6, max_batch=PARAMS.n, audit=True)
    first, second, _ = prompts(9)
    engine.generate("m", PARTED, PARAMS)
    before = engine.stats.snapshot()
    engine.generate("m", [first, second], PARAMS)
    assert engine.stats.since(before).computed["prefill"] == len(first) + len(second) - 2 * len(TEMPLATE) - 9


def test_nothing_is_copied_from_another_model(llama: LanguageModel) -> None:
    other = tiny_language_model("llama", seed=4)
    engine = Engine({"a": llama, "b": other}, audit=True)
    first, second, _ = prompts(9)
    engine.generate("a", [*PARTED, first], PARAMS)
    engine.generate("b", PARTED, PARAMS)
    before = engine.stats.computed["prefill"]
    assert drawn(engine.generate("b", [second], PARAMS)) == drawn(Engine({"b": other}).generate("b", [second], PARAMS))
    assert engine.stats.computed["prefill"] - before == len(second) - len(TEMPLATE)


def test_siblings_are_found_among_many_and_after_evictions(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, pool_bytes=40 * PAGE, audit=True)
    tails = ragged(60, 6, shortest=8, longest=12, seed=8)  # with a vocabulary of six, so that many share a prefix
    for i, tail in enumerate(tails):
        prompt = TEMPLATE + tail
        assert drawn(engine.generate("m", [prompt], PARAMS, [i])) == drawn(
            Engine({"m": llama}).generate("m", [prompt], PARAMS, [i])
        )
    (worker,) = engine.workers.values()
    for node in worker.tree.nodes("m"):
        assert node.sorted_keys == sorted(node.children)
    assert engine.stats.computed["prefill"] < len(TEMPLATE) + sum(map(len, tails)) + 200
