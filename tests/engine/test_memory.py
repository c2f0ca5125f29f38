"""Pages, preemption, eviction and sharing do not change the drawn tokens, and no page leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checks import TOKEN, assert_nothing_is_held, assert_same, assert_same_chains, assert_same_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ragged, tiny_language_model

from alignpro.config import AdapterConfig
from alignpro.engine import Chain, Completion, Engine, SamplingParams, TokenPrompt, derive_seed
from alignpro.engine.prefix_tree import MIN_NODE_TOKENS
from alignpro.errors import DataError
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel

TEMPLATE = ragged(1, 100, shortest=40, longest=40, seed=5)[0]
PROMPTS = [TEMPLATE + tail for tail in ragged(6, 100, shortest=1, longest=30, seed=6)]
PARAMS = SamplingParams(max_tokens=20, n=3, stop_token_ids=(0, 1, 2, 3))


def pool_bytes(pages: int, page_tokens: int = 16) -> int:
    """Return the bytes of that many pages of the tiny Llama."""
    return pages * page_tokens * TOKEN


@pytest.fixture(scope="module")
def expected(llama: LanguageModel) -> list[list[Completion]]:
    """Return the completions of an engine with enough memory, one prompt at a time."""
    seeds = [derive_seed(PARAMS.seed, i) for i in range(len(PROMPTS))]
    return [Engine({"m": llama}).generate("m", [p], PARAMS, [s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]


@pytest.mark.parametrize("page_tokens", [1, 3, 16, 64])
@pytest.mark.parametrize("token_budget", [1, 7, 4096])
def test_tokens_do_not_depend_on_page_size_and_chunked_prefill(
    llama: LanguageModel, expected: list[list[Completion]], page_tokens: int, token_budget: int
) -> None:
    engine = Engine({"m": llama}, page_tokens=page_tokens, token_budget=token_budget, audit=True)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)


def test_chunked_prefill_changes_nothing_in_any_architecture(any_model: LanguageModel) -> None:
    """Covers windows and positions, also of prompts with a common prefix of several chunks."""
    whole = Engine({"m": any_model}).generate("m", PROMPTS, PARAMS)
    engine = Engine({"m": any_model}, page_tokens=3, token_budget=7, max_batch=5, audit=True)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), whole)
    pool = engine.pools[any_model.device]
    small = Engine({"m": any_model}, pool_bytes=35 * pool.page_bytes, page_tokens=3, audit=True)
    assert_same_groups(small.generate("m", PROMPTS, PARAMS), whole)
    assert small.stats.preemptions > 0


@pytest.mark.parametrize("token_budget", [3, 4096])
def test_a_soft_prompt_may_be_chunked_and_is_shared(token_budget: int) -> None:
    model = add_adapter(
        tiny_language_model("llama"), AdapterConfig(kind="soft_prompt", virtual_tokens=20)
    ).requires_grad_(False)
    prompts = [[1, 2, 3], [1, 2, 4, 5], [6]]
    seeds = [derive_seed(0, i) for i in range(3)]
    apart = [Engine({"m": model}).generate("m", [p], PARAMS, [s])[0] for p, s in zip(prompts, seeds, strict=True)]
    engine = Engine({"m": model}, token_budget=token_budget, audit=True)
    assert_same_groups(engine.generate("m", prompts, PARAMS, seeds), apart)
    assert engine.stats.computed["prefill"] <= 20 + sum(map(len, prompts)) + 1


def test_tokens_do_not_depend_on_the_cache(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, audit=True)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)
    computed = engine.stats.computed["prefill"]
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)
    assert engine.stats.computed["prefill"] == computed
    assert engine.stats.cache_hit_tokens == sum(map(len, PROMPTS)) * PARAMS.n
    # Prefixes of cached prompts, of any length, and a prompt that continues one.
    for cut in (TEMPLATE[:33], TEMPLATE, PROMPTS[0] + [5, 6], PROMPTS[1][:50]):
        before = engine.stats.computed["prefill"]
        assert_same_groups(engine.generate("m", [cut], PARAMS), Engine({"m": llama}).generate("m", [cut], PARAMS))
        assert engine.stats.computed["prefill"] - before < MIN_NODE_TOKENS
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)


def test_later_prompts_reuse_cached_prefixes(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, audit=True)
    for i, prompt in enumerate(PROMPTS):
        seed = [derive_seed(PARAMS.seed, i)]
        assert_same_groups(engine.generate("m", [prompt], PARAMS, seed), expected[i : i + 1])
    assert engine.stats.computed["prefill"] <= sum(map(len, PROMPTS)) - 5 * len(TEMPLATE)


def test_sequences_are_preempted_and_draw_the_same(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, pool_bytes=pool_bytes(8), audit=True)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)
    assert engine.stats.preemptions > 0
    assert engine.stats.computed["recompute"] > 0
    assert_nothing_is_held(engine)
    assert_same_groups(
        engine.generate("m", PROMPTS, PARAMS), expected
    )  # the second run starts from the remaining cache


def test_a_prompt_longer_than_the_pool_fails_alone(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, pool_bytes=pool_bytes(6), audit=True)
    seeds = [derive_seed(PARAMS.seed, i) for i in (0, 0, 1)]
    first, (failed, *_), second = engine.generate("m", [PROMPTS[0], [7] * 90, PROMPTS[1]], PARAMS, seeds)
    assert_same_groups([first], expected[:1])
    assert failed.finish_reason == "error"
    assert "the engine's pool has 6" in (failed.error or "")
    assert second[0].error is None


def test_no_stale_page_is_read_after_an_update() -> None:
    model, params = tiny_language_model("llama"), SamplingParams(max_tokens=8, n=2)
    engine = Engine({"m": model}, audit=True)
    before = engine.generate("m", PROMPTS, params)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    engine.weights_updated("m")
    after = engine.generate("m", PROMPTS, params)
    assert_same_groups(after, Engine({"m": model}).generate("m", PROMPTS, params))
    assert [g[0].logprobs for g in after] != [g[0].logprobs for g in before]


def test_memory_is_released_and_allocated_again(llama: LanguageModel, expected: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, audit=True)
    engine.generate("m", PROMPTS, PARAMS)
    (worker,) = engine.workers.values()
    engine.release()
    assert worker.pool.arena_bytes == 0
    assert (worker.pool.num_free, worker.tree.num_cached) == (worker.pool.total, 0)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)
    assert worker.pool.arena_bytes > 0


def test_weights_and_memory_cannot_change_during_a_run(llama: LanguageModel, target: LanguageModel) -> None:
    engine = Engine({"policy": llama, "target": target}, audit=True)

    def meddle(i: int, sample: Completion) -> TokenPrompt:
        if i == 0:
            with pytest.raises(RuntimeError, match="in use"):
                engine.release()
            with pytest.raises(RuntimeError, match="while it generates"):
                engine.weights_updated("policy")
        return TokenPrompt([1])

    rewrite = SamplingParams(max_tokens=4, n=2)
    prompts = [PROMPTS[0], PROMPTS[1]]
    engine.run_chains(prompts, rewrite=rewrite, to_target=meddle, respond=rewrite)


@pytest.mark.parametrize("where", ["to_target", "forward"])
def test_no_page_leaks_when_a_run_is_interrupted(
    llama: LanguageModel, target: LanguageModel, expected: list[list[Completion]], where: str
) -> None:
    engine = Engine({"policy": llama, "target": target}, audit=True)
    calls = 0

    def broken(*_: object) -> TokenPrompt:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return TokenPrompt([1, 2, 3])

    hook = llama.causal.base_model.layers[1].register_forward_pre_hook(
        lambda *_: None if where == "to_target" else broken() and None
    )
    with pytest.raises(KeyboardInterrupt):
        engine.run_chains(
            PROMPTS,
            rewrite=PARAMS,
            to_target=broken if where == "to_target" else lambda i, s: TokenPrompt([1]),
            respond=PARAMS,
        )
    hook.remove()
    assert_nothing_is_held(engine)
    assert_same_groups(engine.generate("policy", PROMPTS, PARAMS), expected)


def test_a_rewrite_that_cannot_be_given_to_the_target_fails_alone(llama: LanguageModel, target: LanguageModel) -> None:
    def to_target(i: int, sample: Completion) -> TokenPrompt:
        if i == 1:
            raise DataError("no room for the conversation")
        return TokenPrompt([1, *sample.tokens])

    engine = Engine({"policy": llama, "target": target}, audit=True)
    first, second = engine.run_chains(PROMPTS[:2], rewrite=PARAMS, to_target=to_target, respond=PARAMS)
    assert [y.error for chain in first for y in chain.responses] == [None] * 9
    assert {y.error for chain in second for y in chain.responses} == {
        "the sample cannot be given to target: no room for the conversation"
    }
    assert_nothing_is_held(engine)


def test_a_stop_text_ends_a_sequence_and_is_cut_from_its_text(llama: LanguageModel) -> None:
    params = SamplingParams(max_tokens=60, n=8)
    (free,) = Engine({"m": llama}).generate("m", PROMPTS[:1], params)
    decode = llama.tokenizer.decode
    stop = decode(free[0].tokens[10:12])
    (group,) = Engine({"m": llama}).generate("m", PROMPTS[:1], replace(params, stop=(stop, "never in there")))
    assert group[0].finish_reason == "stop"
    for completion, whole in zip(group, free, strict=True):
        assert completion.tokens == whole.tokens[: len(completion.tokens)]
        text = decode(whole.tokens)
        assert decode(completion.text_tokens) == text.split(stop)[0]
        assert (completion.finish_reason == "stop") == (stop in text)


class TestChains:
    """Both models share one pool."""

    RESPOND = SamplingParams(max_tokens=30, n=3, stop_token_ids=(0, 1, 2, 3))

    @staticmethod
    def to_target(i: int, sample: Completion) -> TokenPrompt:
        return TokenPrompt([*TEMPLATE[::-1], *sample.tokens, 2])

    def run(self, engine: Engine, prompts: list[list[int]] = PROMPTS) -> list[list[Chain]]:
        return engine.run_chains(prompts, rewrite=PARAMS, to_target=self.to_target, respond=self.RESPOND)

    @pytest.fixture(scope="class")
    def free(self, llama: LanguageModel, target: LanguageModel) -> list[list[Chain]]:
        return self.run(Engine({"policy": llama, "target": target}, audit=True))

    @pytest.mark.parametrize("max_batch", [1, 5, 16])
    def test_the_overlap_of_stages_changes_nothing(
        self, llama: LanguageModel, target: LanguageModel, free: list[list[Chain]], max_batch: int
    ) -> None:
        engine = Engine({"policy": llama, "target": target}, max_batch=max_batch, audit=True)
        assert_same_chains(self.run(engine), free)

    def test_a_pool_too_small_for_both_stages_changes_nothing(
        self, llama: LanguageModel, target: LanguageModel, free: list[list[Chain]]
    ) -> None:
        engine = Engine({"policy": llama, "target": target}, pool_bytes=pool_bytes(8 * 3), audit=True)
        assert_same_chains(self.run(engine), free)
        assert engine.stats.preemptions > 0
        assert_nothing_is_held(engine)
        assert set(engine.stats.peak_pages) == {"policy", "target"}

    def test_few_tokens_are_computed_twice(self, llama: LanguageModel, target: LanguageModel) -> None:
        engine = Engine({"policy": llama, "target": target}, max_batch=12)
        self.run(engine, PROMPTS + [TEMPLATE + tail for tail in ragged(30, 100, shortest=1, longest=30, seed=8)])
        stats = engine.stats
        assert stats.computed["recompute"] == 0
        assert stats.computed.total() <= 1.02 * stats.floor_tokens

    def test_the_frozen_target_keeps_its_prompts(self, llama: LanguageModel, target: LanguageModel) -> None:
        engine = Engine({"policy": llama, "target": target}, audit=True)
        first = self.run(engine)
        engine.weights_updated("policy")
        before = engine.stats.computed["prefill"]
        assert_same_chains(self.run(engine), first)
        (worker,) = engine.workers.values()
        own = sum(len(node.tokens) for node in worker.tree.nodes("policy"))
        assert engine.stats.computed["prefill"] - before == own  # none of the target's prompts

    def test_pages_kept_on_release_are_reused(self, llama: LanguageModel, target: LanguageModel) -> None:
        engine = Engine({"policy": llama, "target": target}, audit=True, page_tokens=4)
        first = self.run(engine)
        (worker,) = engine.workers.values()
        pool, tree = worker.pool, worker.tree
        whole = pool.arena_bytes
        for _ in range(2):
            engine.weights_updated("policy")
            engine.release(keep=["target"])
            assert not list(tree.nodes("policy")) and pool.used["policy"] == 0
            pages = [page for node in tree.nodes("target") for page in node.pages]
            assert sorted(pages) == list(range(len(pages)))
            assert tree.num_cached == len(pages) == pool.used["target"] == pool.total - pool.num_free > 0
            assert pool.arena_bytes == len(pages) * pool.page_bytes < whole
            before = engine.stats.computed["prefill"]
            assert_same_chains(self.run(engine), first)
            assert engine.stats.computed["prefill"] - before == sum(len(n.tokens) for n in tree.nodes("policy"))
            assert pool.arena_bytes == whole
        engine.release(keep=["target"])
        engine.release()
        assert pool.arena_bytes == 0 and pool.num_free == pool.total
        assert_same_chains(self.run(engine), first)
        assert pool.arena_bytes == whole

    def test_release_during_a_run_and_keeping_an_unknown_model_are_errors(
        self, llama: LanguageModel, target: LanguageModel
    ) -> None:
        engine = Engine({"policy": llama, "target": target}, audit=True)

        def meddle(i: int, sample: Completion) -> TokenPrompt:
            with pytest.raises(RuntimeError, match="in use"):
                engine.release(keep=["target", "policy"])
            return self.to_target(i, sample)

        engine.run_chains(PROMPTS[:2], rewrite=PARAMS, to_target=meddle, respond=PARAMS)
        with pytest.raises(ValueError, match="keep names 'critic', and the models are policy, target"):
            engine.release(keep=["critic"])


@given(
    pages=st.integers(6, 20),
    budget=st.sampled_from([3, 20, 4096]),
    max_batch=st.integers(1, 9),
    chosen=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    broken=st.none() | st.integers(0, 12),
)
@settings(max_examples=8)
def test_random_chains_on_a_tiny_pool(
    llama: LanguageModel,
    target: LanguageModel,
    pages: int,
    budget: int,
    max_batch: int,
    chosen: list[int],
    broken: int | None,
) -> None:
    """Two models compete for pages, and the user may interrupt at any time."""
    seeds = [derive_seed(0, i) for i in chosen]
    settings = {"rewrite": PARAMS, "respond": TestChains.RESPOND, "seeds": seeds}
    calls = iter(range(1000))

    def to_target(i: int, sample: Completion) -> TokenPrompt:
        if next(calls) == broken:
            raise KeyboardInterrupt
        return TestChains.to_target(i, sample)

    pool = pages * 16 * 3 * TOKEN  # a token of the target takes three times as much as the prompter's
    engine = Engine(
        {"policy": llama, "target": target}, pool_bytes=pool, token_budget=budget, max_batch=max_batch, audit=True
    )
    prompts = [PROMPTS[i] for i in chosen]
    free = Engine({"policy": llama, "target": target})
    expected = free.run_chains(prompts, to_target=TestChains.to_target, **settings)
    if broken is not None and broken < 3 * len(chosen):
        with pytest.raises(KeyboardInterrupt):
            engine.run_chains(prompts, to_target=to_target, **settings)
        assert_nothing_is_held(engine)
    for group, others in zip(
        engine.run_chains(prompts, to_target=TestChains.to_target, **settings), expected, strict=True
    ):
        for chain, other in zip(group, others, strict=True):
            assert_same(chain.sample, other.sample)
            if chain.responses[0].error is None:
                assert_same_groups([chain.responses], [other.responses])
            else:
                assert pages < 8
                assert "the engine's pool" in chain.responses[0].error
    assert_nothing_is_held(engine)


@given(
    pages=st.integers(5, 14),
    page_tokens=st.sampled_from([4, 16]),
    budget=st.sampled_from([3, 20, 4096]),
    max_batch=st.integers(1, 9),
    calls=st.lists(
        st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.booleans(), st.booleans()),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=25)
def test_random_calls_on_a_tiny_pool(
    llama: LanguageModel,
    expected: list[list[Completion]],
    pages: int,
    page_tokens: int,
    budget: int,
    max_batch: int,
    calls: list[tuple[list[int], bool, bool]],
) -> None:
    """The engine audits its state after every step. Requests that cannot fit fail; the others are unaffected."""
    engine = Engine(
        {"m": llama},
        pool_bytes=pool_bytes(pages * 16 // page_tokens, page_tokens),
        page_tokens=page_tokens,
        token_budget=budget,
        max_batch=max_batch,
        audit=True,
    )
    for chosen, updated, released in calls:
        groups = engine.generate(
            "m", [PROMPTS[i] for i in chosen], PARAMS, [derive_seed(PARAMS.seed, i) for i in chosen]
        )
        for i, group in zip(chosen, groups, strict=True):
            if group[0].error is None:
                assert_same_groups([group], [expected[i]])
            else:
                assert len(PROMPTS[i]) + PARAMS.max_tokens > (pages - 2) * 16
        assert_nothing_is_held(engine)
        if updated:
            engine.weights_updated("m")
        if released:
            engine.release()
