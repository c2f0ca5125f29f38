"""A request that cannot run fails with a reason, the other sequences are unaffected, and no page leaks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from checks import PAGE, assert_nothing_is_held, assert_same, assert_same_groups
from tiny_models import ragged, tiny_language_model, tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from alignpro.engine import Chain, Completion, Engine, SamplingParams, TokenPrompt
from alignpro.errors import ConfigError, ModelError
from alignpro.models.language_model import LanguageModel

PROMPTS = ragged(4, 100, shortest=5, longest=20, seed=9)
PARAMS = SamplingParams(max_tokens=12, n=3)
SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def expected(llama: LanguageModel) -> list[list[Completion]]:
    """Return the completions of the good prompts in a run of their own."""
    return Engine({"m": llama}).generate("m", PROMPTS, PARAMS, SEEDS)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([], "the prompt is empty"),
        ([1] * 117, "117 prompt tokens and 12 new ones do not fit in the context of 128 tokens"),
        ([1] * 100, "100 prompt tokens and 12 new ones take 8 pages, and the engine's pool has 6: give it more memory"),
        ([1, -3], "token -3 is not in the vocabulary"),
    ],
    ids=["empty", "longer than the context", "longer than the pool", "no token"],
)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_bad_prompt_fails_alone_at_any_place_in_the_batch(
    llama: LanguageModel, expected: list[list[Completion]], bad: list[int], reason: str, place: int
) -> None:
    engine = Engine({"m": llama}, pool_bytes=6 * PAGE, audit=True)
    prompts, seeds = list(PROMPTS), list(SEEDS)
    prompts.insert(place, bad)
    seeds.insert(place, 0)
    groups = engine.generate("m", prompts, PARAMS, seeds)
    for completion in groups.pop(place):
        assert (completion.finish_reason, completion.tokens, completion.logprobs) == ("error", [], [])
        assert reason in (completion.error or "")
    assert_same_groups(groups, expected)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("pool_bytes", [1, 1 << 12])
def test_a_pool_too_small_for_any_sequence_fails_all(llama: LanguageModel, pool_bytes: int) -> None:
    """A sequence needs one page for its prompt and one for its completion, so a pool of one page or none is too small."""
    engine = Engine({"m": llama}, pool_bytes=pool_bytes, audit=True)
    groups = engine.generate("m", [[1, 2], [3]], SamplingParams(max_tokens=4, n=2))
    for completion in (each for group in groups for each in group):
        assert completion.finish_reason == "error"
        assert "give it more memory (pool_bytes)" in (completion.error or "")
    assert_nothing_is_held(engine)
    one = engine.generate("m", [[1, 2]], SamplingParams(max_tokens=1))  # its only drawn token is never computed
    assert (one[0][0].error is None) == (pool_bytes > 1)


def test_a_stop_text_that_never_occurs_changes_nothing(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, audit=True)
    groups = engine.generate("m", PROMPTS, replace(PARAMS, stop=("no such text is ever drawn", "\x00")), SEEDS)
    assert_same_groups(groups, expected)
    assert {completion.finish_reason for group in groups for completion in group} == {"length"}
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_below_one_is_refused_before_anything_runs(max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"max_tokens={max_tokens}: expected at least 1"):
        SamplingParams(max_tokens=max_tokens)


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        (BloomForCausalLM, BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2), "AttentionInterface"),
        (
            GptOssForCausalLM,
            GptOssConfig(
                **SMALL,
                intermediate_size=32,
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=2,
                num_experts_per_tok=1,
                attn_implementation="eager",
            ),
            "attention sinks are not supported",
        ),
    ],
    ids=["no interface", "sinks"],
)
def test_unsupported_attention_is_refused_when_the_model_is_wrapped(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(ModelError, match=f"m: {architecture.__name__} is not supported: .*{reason}"):
        LanguageModel(architecture(config).eval(), tokenizer("llama"), "m")


def test_a_callback_that_raises_fails_its_chain_alone(llama: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    target = tiny_language_model("qwen3", seed=1)

    def to_target(i: int, sample: Completion) -> TokenPrompt:
        return TokenPrompt([1, *sample.tokens])

    calls = iter(range(1000))

    def broken(i: int, sample: Completion) -> TokenPrompt:
        if i == 2:
            return TokenPrompt(to_target(i, sample).tokens[:: next(calls) % 2])  # a step of 0 is a ValueError
        return to_target(i, sample)

    engine = Engine({"policy": llama, "target": target}, audit=True)
    settings = {"rewrite": PARAMS, "respond": PARAMS, "seeds": SEEDS}
    expected = Engine({"policy": llama, "target": target}).run_chains(PROMPTS, to_target=to_target, **settings)
    with caplog.at_level(logging.ERROR):
        told = list[Chain]()
        groups = engine.run_chains(PROMPTS, to_target=broken, on_chain=lambda _, chain: told.append(chain), **settings)
    assert len(told) == len(PROMPTS) * PARAMS.n  # also of those that cannot be
    failed = 0
    for group, others in zip(groups, expected, strict=True):
        for chain, other in zip(group, others, strict=True):
            assert_same(chain.sample, other.sample)
            if chain.responses[0].error is None:
                assert_same_groups([chain.responses], [other.responses])
                continue
            failed += 1
            assert {y.error for y in chain.responses} == {
                "the sample cannot be given to target: to_target raised ValueError: slice step cannot be zero"
            }
    assert failed == 2
    assert [record.exc_info is not None for record in caplog.records] == [True] * 2  # with the traceback
    assert_nothing_is_held(engine)


def test_chains_whose_prompts_are_all_refused_are_errors(llama: LanguageModel) -> None:
    engine = Engine({"policy": llama, "target": llama})
    too_long = [[1] * llama.context_length] * 2
    params = SamplingParams(max_tokens=4, n=2)
    groups = engine.run_chains(too_long, rewrite=params, to_target=lambda i, s: TokenPrompt([1]), respond=params)
    assert [len(group) for group in groups] == [2, 2]
    assert all("do not fit in the context" in str(chain.sample.error) for group in groups for chain in group)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda engine: engine.generate("nope", PROMPTS, PARAMS), KeyError),
        (lambda engine: engine.generate("m", PROMPTS, PARAMS, [1]), ValueError),
        (lambda engine: chains(engine, policy="nope", target="m"), KeyError),
        (lambda engine: chains(engine, policy="m", target="nope"), KeyError),
        (lambda engine: chains(engine, policy="m", target="m", seeds=[1]), ValueError),
        (lambda engine: engine.generate("m", PROMPTS, PARAMS, [1.5] * 4), TypeError),
        (lambda engine: chains(engine, policy="m", target="m", seeds=["a"] * 4), TypeError),
        (lambda engine: engine.submit("m", PROMPTS[1], PARAMS, seed=1.5), TypeError),
    ],
)
def test_a_wrong_call_leaves_other_requests_alone(
    llama: LanguageModel, expected: list[list[Completion]], call: Callable[[Engine], object], error: type[Exception]
) -> None:
    engine = Engine({"m": llama}, audit=True)
    request = engine.submit("m", PROMPTS[0], PARAMS, seed=SEEDS[0])
    engine.step()
    with pytest.raises(error):
        call(engine)
    while not request.finished:
        engine.step()
    assert_same_groups([request.completions], expected[:1])


def test_seeds_of_numpy_and_torch(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, audit=True)
    for seeds in (np.array(SEEDS), torch.tensor(SEEDS)):
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS, seeds), expected)
        request = engine.submit("m", PROMPTS[0], PARAMS, seed=seeds[0])
        while not request.finished:
            engine.step()
        assert_same_groups([request.completions], expected[:1])


@pytest.mark.parametrize("key", ["max_batch", "pool_bytes", "page_tokens", "token_budget"])
def test_sizes_below_one_are_named_before_anything_runs(llama: LanguageModel, key: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key}=0: expected at least 1"):
        Engine({"m": llama}, **{key: 0})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [slice(None), slice(5, 6)])
def test_an_output_layer_with_nan_is_an_error_at_any_temperature(temperature: float, row: slice) -> None:
    model = tiny_language_model("llama").requires_grad_(False)
    engine = Engine({"m": model}, audit=True)
    params = SamplingParams(max_tokens=3, temperature=temperature)
    engine.generate("m", PROMPTS, params, SEEDS)
    head = model.causal.get_output_embeddings()
    assert head is not model.causal.get_input_embeddings()
    head.weight[row] = torch.nan
    engine.weights_updated("m")
    with pytest.raises(ModelError, match="NaN"):
        engine.generate("m", PROMPTS, params, SEEDS)
    assert_nothing_is_held(engine)


def chains(engine: Engine, **settings: Any) -> object:
    return engine.run_chains(
        PROMPTS, rewrite=PARAMS, to_target=lambda i, sample: TokenPrompt([1]), respond=PARAMS, **settings
    )


@pytest.mark.parametrize("temperature", [-1.0, 1e-39, 1e-5, float("inf"), float("nan")])
def test_a_temperature_that_no_float32_bears_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=r"temperature=.*: expected 0, or a finite number of at least 0\.0001"):
        SamplingParams(temperature=temperature)
