"""A prompter that is a LoRA on the target gives the chains of two models, with shared prefixes and joint forward passes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from checks import TOKEN, assert_same_chains, assert_same_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ACTIVATED, ARCHITECTURES, ragged, tiny_adapted, tiny_language_model

from alignpro.config import AdapterConfig
from alignpro.engine import Chain, Completion, Engine, SamplingParams, TokenPrompt
from alignpro.engine.prefix_tree import MIN_NODE_TOKENS
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.reference_logprobs import sequence_logprob

TEMPLATE = ragged(1, 60, shortest=30, longest=30, seed=5)[0]
TEXTS = [TEMPLATE + tail for tail in ragged(5, 60, shortest=1, longest=20, seed=6)]
REWRITE = SamplingParams(max_tokens=9, n=3, stop_token_ids=(0, 1))
RESPOND = SamplingParams(max_tokens=7, n=2, stop_token_ids=(2,), temperature=0.8)
SEEDS = [11, 12, 13, 14, 15]


def adapted(architecture: str = "llama", *, activated: bool = True, head: bool = False) -> LanguageModel:
    """Return a model whose LoRA is not zero."""
    adapter = ACTIVATED if activated else AdapterConfig(kind="lora", rank=4)
    if head:
        adapter = adapter.model_copy(update={"target_modules": ["q_proj", "v_proj", "lm_head"]})
    return tiny_adapted(architecture, adapter=adapter, size=0.1).requires_grad_(False)


def prompts(model: LanguageModel) -> list[list[int]]:
    """Return the prompter's inputs; each ends with the adapter's invocation tokens."""
    return [[*text, *model.invocation] for text in TEXTS]


def to_target(i: int, sample: Completion) -> TokenPrompt:
    """The target sees the rewrite alone, or after the prompt."""
    return TokenPrompt([1, *sample.tokens, 2] if i % 2 else [*TEXTS[i], *sample.tokens])


def chains(engine: Engine, inputs: list[list[int]]) -> list[list[Chain]]:
    return engine.run_chains(inputs, rewrite=REWRITE, to_target=to_target, respond=RESPOND, seeds=SEEDS)


@pytest.fixture(scope="module")
def prompter() -> LanguageModel:
    return adapted()


@pytest.fixture(scope="module")
def expected(prompter: LanguageModel, llama: LanguageModel) -> list[list[Chain]]:
    """Return the chains of two models with separate weights."""
    return chains(Engine({"policy": adapted(), "target": llama}, audit=True), prompts(prompter))


def shared(model: LanguageModel, **options: object) -> Engine:
    return Engine({"policy": model, "target": model.without_adapter()}, audit=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_those_of_pefts_generate(architecture: str) -> None:
    model = adapted(architecture)
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    inputs = prompts(model)
    drawn = Engine({"policy": model}, audit=True).generate("policy", inputs, greedy)
    for prompt, (completion,) in zip(inputs, drawn, strict=True):
        ids = torch.tensor([prompt])
        truth = model.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert truth[0, len(prompt) :].tolist() == completion.tokens
    with model.disable_adapter():
        assert Engine({"policy": model}).generate("policy", inputs, greedy) != drawn


@pytest.mark.parametrize("head", [False, True])
def test_logprobs_equal_those_of_training(head: bool) -> None:
    model = adapted(head=head)
    params = SamplingParams(max_tokens=8, n=2)
    drawn = shared(model).generate("policy", prompts(model), params)
    rows = [(prompt, c) for prompt, group in zip(prompts(model), drawn, strict=True) for c in group]
    batch = SequenceBatch.build([prompt for prompt, _ in rows], [c.tokens for _, c in rows])
    truth = sequence_logprob(model, batch, 1.0)
    assert [sum(c.logprobs) for _, c in rows] == pytest.approx(truth.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"page_tokens": 3, "token_budget": 7, "max_batch": 4}, {"pool_bytes": 22 << 10, "page_tokens": 4}]
)
def test_chains_equal_those_of_two_models(
    prompter: LanguageModel, expected: list[list[Chain]], settings: dict[str, int]
) -> None:
    engine = shared(prompter, **settings)
    assert_same_chains(chains(engine, prompts(prompter)), expected)
    assert (engine.stats.preemptions > 0) == ("pool_bytes" in settings)
    assert_same_chains(chains(engine, prompts(prompter)), expected)  # from the cache


def test_a_lora_and_its_base_generate_in_two_threads(prompter: LanguageModel) -> None:
    engines = [Engine({"m": model}, audit=True) for model in (prompter, prompter.without_adapter())]
    params = SamplingParams(max_tokens=30, n=4)
    draw = [partial(engine.generate, "m", prompts(prompter), params, SEEDS) for engine in engines]
    alone = [each() for each in draw]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            for found, expected in zip([each.result() for each in map(threads.submit, draw)], alone, strict=True):
                assert_same_groups(found, expected)


@pytest.mark.parametrize("head", [False, True])
def test_chains_of_a_plain_lora_too(llama: LanguageModel, head: bool) -> None:
    model = adapted(activated=False, head=head)
    apart = Engine({"policy": adapted(activated=False, head=head), "target": llama})
    assert_same_chains(chains(shared(model), TEXTS), chains(apart, TEXTS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chains_of_every_architecture(architecture: str) -> None:
    model = adapted(architecture)
    inputs = prompts(model)
    apart = Engine({"policy": adapted(architecture), "target": tiny_language_model(architecture)})
    assert_same_chains(chains(shared(model), inputs), chains(apart, inputs))


def test_both_stages_run_in_one_forward_pass(llama: LanguageModel) -> None:
    model = adapted(activated=False)  # a plain LoRA shares no keys and values with its base
    fused, apart = shared(model), Engine({"policy": model, "target": llama})
    for engine in (fused, apart):
        chains(engine, TEXTS)
    assert fused.stats.ticks < apart.stats.ticks
    assert fused.stats.computed == apart.stats.computed


def test_tokens_before_the_invocation_are_computed_once_for_prompter_and_target(prompter: LanguageModel) -> None:
    engine, params = shared(prompter), SamplingParams(max_tokens=1)
    inputs = prompts(prompter)
    engine.generate("policy", inputs, params)
    computed = engine.stats.computed["prefill"]
    floor = len(TEMPLATE) + sum(len(text) - len(TEMPLATE) for text in TEXTS) + 2 * len(TEXTS)
    assert floor <= computed <= floor + len(TEXTS) * MIN_NODE_TOKENS
    engine.generate("target", TEXTS, params)  # the baseline: no rewrite
    assert engine.stats.computed["prefill"] == computed
    assert engine.stats.computed["recompute"] == len(TEXTS)  # the last state of each, from which the target draws


def test_the_sharing_floor_is_reached(prompter: LanguageModel) -> None:
    engine = shared(prompter)
    common, params = ragged(1, 60, shortest=40, longest=40)[0], SamplingParams(max_tokens=6, n=4)
    engine.run_chains(
        [[*common, *prompter.invocation]],
        rewrite=params,
        to_target=lambda i, sample: TokenPrompt([*common, *sample.tokens]),
        respond=params,
    )
    computed = sum(engine.stats.computed.values())
    # The four rewrites may share prefixes shorter than a node, which are computed separately.
    assert 0 <= computed - engine.stats.floor_tokens <= 4
    assert engine.stats.floor_tokens < 2 * len(common) + 2 * 4 * 5 + 4 * 4 * 5


def test_new_lora_weights_keep_the_pages_of_the_base_model(llama: LanguageModel) -> None:
    model = adapted()
    engine, inputs = shared(model), prompts(model)
    before = chains(engine, inputs)
    computed = engine.stats.computed["prefill"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.mul_(-1.5)
    engine.weights_updated("policy")
    (worker,) = engine.workers.values()
    assert worker.pool.used["policy"] == 0 < worker.pool.used["target"]
    params = SamplingParams(max_tokens=4, n=2)
    again = engine.generate("policy", inputs, params, SEEDS)
    assert engine.stats.computed["prefill"] - computed == 2 * len(inputs)  # the invocations
    truth = Engine({"policy": model}).generate("policy", inputs, params, SEEDS)
    assert_same_groups(again, truth)
    after = chains(engine, inputs)
    assert_same_chains(after, chains(Engine({"policy": model, "target": llama}), inputs))
    assert [c.sample.tokens for g in after for c in g] != [c.sample.tokens for g in before for c in g]
    engine.weights_updated("target")
    assert worker.pool.num_free == worker.pool.total


def test_prefixes_are_shared_over_steps_without_a_target(prompter: LanguageModel) -> None:
    engine, params = Engine({"policy": prompter}, audit=True), SamplingParams(max_tokens=3)
    first = engine.generate("policy", prompts(prompter), params)
    computed = engine.stats.computed["prefill"]
    engine.weights_updated("policy")
    again = engine.generate("policy", prompts(prompter), params)
    assert_same_groups(again, first)
    assert engine.stats.computed["prefill"] - computed == 2 * len(TEXTS)


def test_a_prompt_without_an_invocation_fails_alone(prompter: LanguageModel, expected: list[list[Chain]]) -> None:
    inputs = [*prompts(prompter)[:2], TEXTS[2], *prompts(prompter)[3:]]
    result = chains(shared(prompter), inputs)
    assert_same_chains(result[:2] + result[3:], expected[:2] + expected[3:])
    assert {chain.sample.error for chain in result[2]} == {
        f"the prompt does not contain the invocation tokens {list(prompter.invocation)}, from which the activated LoRA "
        "acts: is it rendered with the chat template that the adapter was trained with?"
    }


@settings(max_examples=8)
@given(
    pages=st.integers(12, 40),
    page_tokens=st.sampled_from([1, 4, 16]),
    budget=st.integers(1, 60),
    batch=st.integers(1, 30),
    update=st.booleans(),
)
def test_chains_do_not_depend_on_the_available_memory(
    prompter: LanguageModel,
    expected: list[list[Chain]],
    pages: int,
    page_tokens: int,
    budget: int,
    batch: int,
    update: bool,
) -> None:
    """The engine audits its state after each step."""
    engine = shared(
        prompter,
        pool_bytes=max(pages * page_tokens, 130 + 3 * page_tokens) * TOKEN,
        page_tokens=page_tokens,
        token_budget=budget,
        max_batch=batch,
    )
    for _ in range(2):
        assert_same_chains(chains(engine, prompts(prompter)), expected)
        if update:
            engine.weights_updated("policy")
    (worker,) = engine.workers.values()
    assert worker.pool.total - worker.pool.num_free == worker.tree.num_cached


@pytest.mark.parametrize("activated", [True, False])
def test_decode_steps_of_fixed_shapes_change_nothing(activated: bool) -> None:
    """Some steps have both stages, so that the adapter acts on some of the tokens."""
    model = adapted(activated=activated)
    inputs = prompts(model)
    engine = shared(model, cuda_graphs="padded", max_batch=8)
    assert_same_chains(chains(engine, inputs), chains(shared(model, max_batch=8), inputs))
    (worker,) = engine.workers.values()
    assert worker.graphs and engine.stats.decode_ticks["padded"] > 10
    assert [plan for plan in worker.graphs._plans.by_shape.values() if plan.shape.active > 0]


def test_prompts_of_the_base_can_be_kept_on_release(prompter: LanguageModel, expected: list[list[Chain]]) -> None:
    engine = shared(prompter)
    assert_same_chains(chains(engine, prompts(prompter)), expected)
    (worker,) = engine.workers.values()
    engine.release(keep=["target"])
    nodes = list(worker.tree.nodes("target"))
    assert nodes and {node.model for node in nodes} == {"target"}
    assert worker.pool.arena_bytes == sum(len(node.pages) for node in nodes) * worker.pool.page_bytes
    before = engine.stats.computed["prefill"]
    assert_same_chains(chains(engine, prompts(prompter)), expected)
    acted_on = sum(len(node.tokens) for node in worker.tree.nodes("target") if node.model == "policy")
    assert engine.stats.computed["prefill"] - before == acted_on


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_of_both_stages_together() -> None:
    model = adapted().cuda()
    graphs, padded = (shared(model, cuda_graphs=how, max_batch=8) for how in (True, "padded"))
    results = chains(padded, prompts(model))
    for _ in range(2):
        assert_same_chains(chains(graphs, prompts(model)), results)
    assert graphs.stats.decode_ticks["replayed"] > 0
