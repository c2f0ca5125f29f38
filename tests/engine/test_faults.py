"""What raises in the middle of a run fails alone: the others draw what they would have drawn, and no page is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ragged, tiny_adapted, tiny_language_model
from torch import Tensor

from alignpro.engine import Chain, Completion, Engine, SamplingParams, derive_seed, runner
from alignpro.errors import ModelError
from alignpro.language_model import LanguageModel

TEMPLATE = ragged(1, 60, shortest=20, longest=20, seed=5)[0]
PROMPTS = [TEMPLATE + tail for tail in ragged(6, 60, shortest=1, longest=30, seed=6)]
PARAMS = SamplingParams(max_tokens=14, n=3, stop_token_ids=(0, 1))
RESPOND = SamplingParams(max_tokens=9, n=2, stop_token_ids=(2, 3), temperature=0.8)
SEEDS = [derive_seed(7, i) for i in range(len(PROMPTS))]
PAGE = 16 * 2 * 2 * 2 * 8 * 4  # bytes of the tiny Llama's: two layers, keys and values, two heads of eight, float32

Check = Callable[[Tensor], None]
"""Looks at the ids of a forward pass, (T,), and may raise."""


@contextmanager
def watched(model: LanguageModel, check: Check) -> Iterator[None]:
    """Within, every forward pass of a model is looked at first."""
    embedding = model.causal.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, inputs: check(inputs[0].flatten()))
    try:
        yield
    finally:
        hook.remove()


def probed(models: dict[str, LanguageModel], **options: Any) -> Engine:
    """An engine that knows its models already, as after its first run."""
    engine = Engine(models, audit=True, **options)
    for model in models.values():
        engine._memory(model.device)
    return engine


def raises_at(*tokens: int) -> Check:
    """A model that cannot take some tokens."""

    def check(ids: Tensor) -> None:
        if bad := sorted(set(tokens) & set(ids.tolist())):
            raise ValueError(f"token {bad[0]} is poison")

    return check


def runs_out_above(count: int) -> Check:
    """A device with memory for a pass of so many tokens."""

    def check(ids: Tensor) -> None:
        if len(ids) > count:
            raise torch.OutOfMemoryError(f"no memory for {len(ids)} tokens")

    return check


def assert_nothing_is_held(engine: Engine) -> None:
    for memory in engine._memories.values():
        assert memory.tree.locked == 0
        assert memory.pool.free + memory.tree.cached == memory.pool.total


def assert_same(one: Completion, other: Completion) -> None:
    assert (one.tokens, one.finish_reason, one.error) == (other.tokens, other.finish_reason, other.error)
    assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def is_hit(prompt: Sequence[int], free: Completion, bad: Sequence[int]) -> bool:
    """Whether a sequence has to compute one of some tokens; the last that is drawn never is."""
    return not set(bad).isdisjoint([*prompt, *free.tokens[:-1]])


def assert_failed_alone(
    groups: list[list[Completion]], free: list[list[Completion]], inputs: Sequence[Sequence[int]], bad: Sequence[int]
) -> int:
    """Those that have a bad token have failed, the others are as ever; returns how many have failed."""
    failed = 0
    for group, others, prompt in zip(groups, free, inputs, strict=True):
        for one, other in zip(group, others, strict=True):
            if is_hit(prompt, other, bad):
                failed += 1
                assert (one.tokens, one.logprobs, one.finish_reason) == ([], [], "error")
                assert f"raised ValueError: token {bad[0]} is poison" in (one.error or "")
            else:
                assert_same(one, other)
    return failed


def to_target(i: int, sample: Completion) -> list[int]:
    return [*TEMPLATE[::-1], *sample.tokens, 2]


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    """Of other geometry than the tiny Llama: its tokens take three times the memory."""
    return tiny_language_model("qwen3", seed=1, num_key_value_heads=4, num_hidden_layers=3)


@pytest.fixture(scope="module")
def free(llama: LanguageModel) -> list[list[Completion]]:
    """What is drawn where nothing fails."""
    return Engine({"m": llama}).generate("m", PROMPTS, PARAMS, SEEDS)


@pytest.fixture(scope="module")
def drawn_by_some(free: list[list[Completion]]) -> int:
    """A token of no prompt that some sequences draw in their midst."""
    drawn = [token for group in free for one in group for token in one.tokens[3:8]]
    return next(token for token in drawn if all(token not in prompt for prompt in PROMPTS))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"token_budget": 7, "page_tokens": 3},
    {"max_batch": 4},
    {"pool_bytes": 6 * PAGE},
    {"cuda_graphs": "padded"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=["plain", "in pieces", "few at once", "preempted", "fixed shapes"])
@pytest.mark.parametrize("where", ["own prompt", "shared prompt", "drawn"])
def test_a_forward_pass_that_raises_fails_whose_token_it_is(
    llama: LanguageModel, free: list[list[Completion]], drawn_by_some: int, options: dict[str, Any], where: str
) -> None:
    bad = {"own prompt": PROMPTS[2][-1], "shared prompt": TEMPLATE[-1], "drawn": drawn_by_some}[where]
    engine = probed({"m": llama}, **options)
    with watched(llama, raises_at(bad)):
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    failed = assert_failed_alone(groups, free, PROMPTS, [bad])
    assert failed == 18 if where == "shared prompt" else 0 < failed < 18
    assert_nothing_is_held(engine)
    assert engine.stats.preemptions > 0 or "pool_bytes" not in options or where != "drawn"
    # What is cached was computed whole.
    again = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert assert_failed_alone(again, free, PROMPTS, [-5]) == 0


@pytest.mark.parametrize("max_batch", [3, 256])
@pytest.mark.parametrize("stage", ["policy", "target"])
def test_a_chain_whose_pass_raises_fails_alone(
    llama: LanguageModel, target: LanguageModel, stage: str, max_batch: int
) -> None:
    models = {"policy": llama, "target": target}
    settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
    free = Engine(models).run_chains(PROMPTS, **settings)
    flat = [chain for group in free for chain in group]
    drawn = [c.sample for c in flat] if stage == "policy" else [y for c in flat for y in c.responses]
    bad = next(token for one in drawn for token in one.tokens[2:5] if token not in (*TEMPLATE, 2))
    engine = probed(models, max_batch=max_batch)
    with watched(models[stage], raises_at(bad)):
        chains = engine.run_chains(PROMPTS, **settings)
    failed = assert_chains_failed_alone(chains, free, [bad] if stage == "policy" else [], [bad], stage)
    assert 0 < failed < len(drawn)
    assert_nothing_is_held(engine)
    assert assert_chains_failed_alone(engine.run_chains(PROMPTS, **settings), free, [], [], stage) == 0


def assert_chains_failed_alone(
    chains: list[list[Chain]], free: list[list[Chain]], bad: list[int], respond_bad: list[int], stage: str
) -> int:
    """As `assert_failed_alone`, of both stages; with a rewrite all its responses fail."""
    failed = 0
    for group, others, prompt in zip(chains, free, PROMPTS, strict=True):
        for chain, other in zip(group, others, strict=True):
            samples = [[chain.sample]], [[other.sample]]
            if assert_failed_alone(*samples, [prompt], bad):
                failed += 1
                reason = f"there is no sample to respond to: {chain.sample.error}"
                assert [(y.finish_reason, y.error) for y in chain.responses] == [("error", reason)] * RESPOND.n
                continue
            responses = [chain.responses], [other.responses]
            failed += assert_failed_alone(*responses, [other.target_tokens], respond_bad if stage == "target" else [])
    return failed


def test_a_pass_of_both_stages_that_raises_fails_the_sequences_of_one() -> None:
    """Prompter and target are one model, in one forward pass."""
    policy = tiny_adapted(size=0.1).requires_grad_(False)
    inputs = [[*prompt, *policy.invocation] for prompt in PROMPTS]
    settings: Any = {"rewrite": PARAMS, "respond": RESPOND, "seeds": SEEDS}

    bad = next(token for token in range(60, 90) if all(token not in prompt for prompt in inputs))

    def only_targets(i: int, sample: Completion) -> list[int]:
        return [*PROMPTS[i], bad, *sample.tokens] if i % 2 else to_target(i, sample)

    models = {"policy": policy, "target": policy.base()}
    free = Engine(models).run_chains(inputs, to_target=only_targets, **settings)
    engine = probed(models, max_batch=6)
    with watched(policy, raises_at(bad)):
        chains = engine.run_chains(inputs, to_target=only_targets, **settings)
    assert_nothing_is_held(engine)
    for i, (group, others) in enumerate(zip(chains, free, strict=True)):
        for chain, other in zip(group, others, strict=True):
            if assert_failed_alone([[chain.sample]], [[other.sample]], [inputs[i]], [bad]):
                continue
            assert_failed_alone([chain.responses], [other.responses], [other.target_tokens], [bad])
            assert i % 2 == 0 or {y.finish_reason for y in chain.responses} == {"error"}


def test_what_raises_once_fails_nobody(
    llama: LanguageModel, free: list[list[Completion]], caplog: pytest.LogCaptureFixture
) -> None:
    passes = iter(range(1000))

    def check(_: Tensor) -> None:
        if next(passes) in (0, 5, 6, 20):
            raise OSError("a hiccup")

    engine = probed({"m": llama})
    with watched(llama, check):
        ((alone,),) = engine.generate("m", [[9]], SamplingParams(max_tokens=1))  # nothing can be parted from it
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert assert_failed_alone(groups, free, PROMPTS, []) == 0
    assert alone.error == "a forward pass of llama raised OSError: a hiccup"
    assert "OSError: a hiccup" in caplog.text  # with the traceback
    assert_nothing_is_held(engine)


def test_where_every_pass_raises_all_fail_and_the_engine_goes_on(
    llama: LanguageModel, free: list[list[Completion]]
) -> None:
    engine = probed({"m": llama}, max_batch=5)
    with watched(llama, raises_at(*range(llama.vocabulary))):
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert {one.finish_reason for group in groups for one in group} == {"error"}
    assert_nothing_is_held(engine)
    assert assert_failed_alone(engine.generate("m", PROMPTS, PARAMS, SEEDS), free, PROMPTS, []) == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ModelError("it cannot be captured"),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_nothing_can_follow_ends_the_run(
    llama: LanguageModel, free: list[list[Completion]], error: BaseException
) -> None:
    passes = iter(range(1000))

    def check(_: Tensor) -> None:
        if next(passes) == 7:
            raise error

    engine = probed({"m": llama})
    with watched(llama, check), pytest.raises(type(error)):
        engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert next(passes) == 8
    assert_nothing_is_held(engine)
    assert assert_failed_alone(engine.generate("m", PROMPTS, PARAMS, SEEDS), free, PROMPTS, []) == 0


@pytest.mark.parametrize("options", [{}, {"pool_bytes": 8 * PAGE}, {"cuda_graphs": "padded"}])
@pytest.mark.parametrize("room", [1, 5, 40])
def test_passes_shrink_to_what_memory_allows(
    llama: LanguageModel,
    free: list[list[Completion]],
    caplog: pytest.LogCaptureFixture,
    room: int,
    options: dict[str, Any],
) -> None:
    engine = probed({"m": llama}, **options)
    sizes: list[int] = []

    def check(ids: Tensor) -> None:
        sizes.append(len(ids))
        runs_out_above(room)(ids)

    with watched(llama, check):
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert assert_failed_alone(groups, free, PROMPTS, []) == 0
    assert sum(size > room for size in sizes) <= 10 < len(sizes)  # it is found out once, and not in every tick
    assert sum("memory has run out" in record.message for record in caplog.records) == 1
    assert_nothing_is_held(engine)


def test_a_sequence_for_which_there_is_no_memory_fails_alone(
    llama: LanguageModel, free: list[list[Completion]], drawn_by_some: int
) -> None:
    sizes: list[int] = []

    def check(ids: Tensor) -> None:
        sizes.append(len(ids))
        if drawn_by_some in ids:
            raise torch.OutOfMemoryError("token is poison")

    engine = probed({"m": llama})
    with watched(llama, check):
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    for group, others, prompt in zip(groups, free, PROMPTS, strict=True):
        for one, other in zip(group, others, strict=True):
            if is_hit(prompt, other, [drawn_by_some]):
                assert "raised OutOfMemoryError: token is poison" in (one.error or "")
            else:
                assert_same(one, other)
    assert max(sizes[-5:]) > 1  # and the passes of the others do not shrink for it
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_tokens=14, n=3, stop_token_ids=(0, 1), top_p=0.9)])
def test_a_draw_that_raises_fails_whose_it_is(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    free = Engine({"m": llama}).generate("m", PROMPTS, params, SEEDS)
    bad = [derive_seed(derive_seed(SEEDS[i], k), t) for i, k, t in ((0, 1, 0), (3, 2, 4), (5, 0, 4))]
    hit = [(i, k) for i, k, t in ((0, 1, 0), (3, 2, 4), (5, 0, 4)) if len(free[i][k].tokens) > t]
    sample = runner.sample

    def broken(hidden: Tensor, head: Any, how: SamplingParams, seeds: Tensor) -> tuple[Tensor, Tensor]:
        if not set(bad).isdisjoint(seeds.tolist()):
            raise ZeroDivisionError("no luck")
        return sample(hidden, head, how, seeds)

    monkeypatch.setattr(runner, "sample", broken)
    engine = probed({"m": llama})
    groups = engine.generate("m", PROMPTS, params, SEEDS)
    assert len(hit) > 1
    for i, (group, others) in enumerate(zip(groups, free, strict=True)):
        for k, (one, other) in enumerate(zip(group, others, strict=True)):
            if (i, k) in hit:
                assert one.error == "the draw of a token raised ZeroDivisionError: no luck"
            else:
                assert_same(one, other)
    assert_nothing_is_held(engine)


def test_those_that_have_drawn_when_a_draw_raises_do_not_draw_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages draw after one forward pass, each in its own way."""
    policy = tiny_adapted(size=0.1).requires_grad_(False)
    models = {"policy": policy, "target": policy.base()}
    inputs = [[*prompt, *policy.invocation] for prompt in PROMPTS]
    settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
    free = Engine(models).run_chains(inputs, **settings)
    of_responses = {
        derive_seed(derive_seed(derive_seed(seed, "respond", k), m), t)
        for seed in SEEDS
        for k in range(PARAMS.n)
        for m in range(RESPOND.n)
        for t in range(2, 5)
    }
    sample = runner.sample

    def broken(hidden: Tensor, head: Any, how: SamplingParams, seeds: Tensor) -> tuple[Tensor, Tensor]:
        if not of_responses.isdisjoint(seeds.tolist()):
            raise ZeroDivisionError("no luck")
        return sample(hidden, head, how, seeds)

    monkeypatch.setattr(runner, "sample", broken)
    engine = probed(models, max_batch=6)
    chains = engine.run_chains(inputs, **settings)
    assert_nothing_is_held(engine)
    for group, others in zip(chains, free, strict=True):
        for chain, other in zip(group, others, strict=True):
            assert_same(chain.sample, other.sample)
            for y, expected in zip(chain.responses, other.responses, strict=True):
                assert (y.finish_reason == "error") == (len(expected.tokens) > 2)


def test_a_tokenizer_that_raises_fails_whose_text_it_is(
    llama: LanguageModel, free: list[list[Completion]], drawn_by_some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = llama.tokenizer.decode

    def broken(tokens: list[int]) -> Any:
        if drawn_by_some in tokens:
            raise UnicodeError("no such character")
        return decode(tokens)

    monkeypatch.setattr(llama.tokenizer, "decode", broken)
    params = SamplingParams(max_tokens=14, n=3, stop_token_ids=(0, 1), stop=("never in there",))
    engine = probed({"m": llama})
    groups = engine.generate("m", PROMPTS, params, SEEDS)
    failed = 0
    for group, others in zip(groups, free, strict=True):
        for one, other in zip(group, others, strict=True):
            if drawn_by_some in other.tokens:
                failed += 1
                assert one.error == "the search for a stop text raised UnicodeError: no such character"
            else:
                assert_same(one, other)
    assert failed > 0
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("given", [None, ["a"], [1, 2.5]])
def test_a_target_prompt_of_no_tokens_fails_its_chain_alone(llama: LanguageModel, given: Any) -> None:
    engine = Engine({"policy": llama, "target": llama}, audit=True)
    settings: Any = {"rewrite": PARAMS, "respond": RESPOND, "seeds": SEEDS[:2]}
    first, second = engine.run_chains(PROMPTS[:2], to_target=lambda i, s: given if i else [1], **settings)
    assert [y.error for chain in first for y in chain.responses] == [None] * 6
    for chain in second:
        assert chain.sample.error is None
        assert all("to target: to_target raised TypeError" in (y.error or "") for y in chain.responses)
    assert_nothing_is_held(engine)


class TestPool:
    """A device that has less memory than the pool was to have."""

    @staticmethod
    def engine(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, pages: int) -> Engine:
        engine = Engine({"m": model}, audit=True)
        pool = engine._memory(model.device).pool
        take = pool.take

        def limited(count: int) -> None:
            if count > pages:
                raise torch.OutOfMemoryError("no memory for the arena")
            take(count)

        monkeypatch.setattr(pool, "take", limited)
        return engine

    @pytest.mark.parametrize("pages", [8, 20])
    def test_it_takes_what_there_is(
        self,
        llama: LanguageModel,
        free: list[list[Completion]],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        pages: int,
    ) -> None:
        engine = self.engine(llama, monkeypatch, pages)
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert assert_failed_alone(groups, free, PROMPTS, []) == 0
        (memory,) = engine._memories.values()
        assert pages // 2 <= memory.pool.total <= pages
        assert sum("has memory for" in record.message for record in caplog.records) == 1
        assert_nothing_is_held(engine)

    @pytest.mark.parametrize("pages", [0, 1, 2, 3, 4])
    def test_it_fails_what_does_not_fit(
        self, llama: LanguageModel, free: list[list[Completion]], monkeypatch: pytest.MonkeyPatch, pages: int
    ) -> None:
        engine = self.engine(llama, monkeypatch, pages)
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        for group, others, prompt in zip(groups, free, PROMPTS, strict=True):
            for one, other in zip(group, others, strict=True):
                needed = -(-len(prompt) // 16) + -(-(len(other.tokens) - 1) // 16)
                if one.error is None:
                    assert_same(one, other)
                    assert needed <= pages
                else:
                    assert f"only {engine._memories[llama.device].pool.total} pages" in one.error
                    assert needed > pages // 2
        assert_nothing_is_held(engine)
        monkeypatch.undo()  # there is memory again
        assert assert_failed_alone(engine.generate("m", PROMPTS, PARAMS, SEEDS), free, PROMPTS, []) == 0

    def test_what_was_given_back_and_cannot_be_had_again_grows_as_it_is_needed(
        self, llama: LanguageModel, free: list[list[Completion]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = probed({"m": llama})
        engine.generate("m", PROMPTS, PARAMS, SEEDS)
        (memory,) = engine._memories.values()
        engine.release(keep=["m"])
        pool, take = memory.pool, memory.pool.take
        kept = pool.total - pool.free

        def limited(count: int) -> None:
            if count > 2 * kept:
                raise torch.OutOfMemoryError("no memory for the arena")
            take(count)

        monkeypatch.setattr(pool, "take", limited)
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert assert_failed_alone(groups, free, PROMPTS, []) == 0
        assert_nothing_is_held(engine)

    def test_a_pool_beyond_all_memory_is_taken_as_it_is_needed(
        self, llama: LanguageModel, free: list[list[Completion]]
    ) -> None:
        engine = Engine({"m": llama}, pool_bytes=1 << 56, audit=True)
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert assert_failed_alone(groups, free, PROMPTS, []) == 0
        assert_nothing_is_held(engine)


@given(
    pages=st.integers(8, 24),
    budget=st.sampled_from([3, 20, 4096]),
    max_batch=st.integers(1, 9),
    shapes=st.sampled_from([None, "padded"]),
    bad=st.sets(st.integers(10, 90), max_size=2),
    room=st.sampled_from([2, 9, 4096]),
    hiccups=st.sets(st.integers(0, 60), max_size=3),
    chosen=st.lists(st.integers(0, 5), min_size=1, max_size=4),
)
@settings(max_examples=10)
def test_random_faults(
    llama: LanguageModel,
    target: LanguageModel,
    pages: int,
    budget: int,
    max_batch: int,
    shapes: Any,
    bad: set[int],
    room: int,
    hiccups: set[int],
    chosen: list[int],
) -> None:
    """Tokens that raise in either stage, too little memory, and passes that raise now and then."""
    models = {"policy": llama, "target": target}
    inputs = [PROMPTS[i] for i in chosen]
    settings: Any = {
        "rewrite": PARAMS,
        "to_target": to_target,
        "respond": RESPOND,
        "seeds": [SEEDS[i] for i in chosen],
    }
    free = Engine(models).run_chains(inputs, **settings)
    engine = probed(models, pool_bytes=3 * pages * PAGE, token_budget=budget, max_batch=max_batch, cuda_graphs=shapes)
    passes = iter(range(100_000))

    def check(ids: Tensor) -> None:
        if next(passes) in hiccups:
            raise OSError("a hiccup")
        runs_out_above(room)(ids)
        raises_at(*bad)(ids)

    with watched(models["policy"], check), watched(models["target"], check):
        chains = engine.run_chains(inputs, **settings)
    assert_nothing_is_held(engine)
    for group, others, prompt in zip(chains, free, inputs, strict=True):
        for chain, other in zip(group, others, strict=True):
            pairs = [(prompt, chain.sample, other.sample)]
            if chain.sample.error is None:
                pairs += [(other.target_tokens, *pair) for pair in zip(chain.responses, other.responses, strict=True)]
            for tokens, one, expected in pairs:
                if one.error is None:
                    assert_same(one, expected)
                    assert not is_hit(tokens, expected, sorted(bad))
                elif "poison" in one.error:
                    assert is_hit(tokens, expected, sorted(bad))
                else:
                    assert hiccups and "OSError: a hiccup" in one.error
    again = engine.run_chains(inputs, **settings)
    for group, others in zip(again, free, strict=True):
        for chain, other in zip(group, others, strict=True):
            for one, expected in zip([chain.sample, *chain.responses], [other.sample, *other.responses], strict=True):
                assert_same(one, expected)


def test_log_names_the_reason(llama: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    engine = probed({"m": llama})
    with watched(llama, raises_at(PROMPTS[2][-1])), caplog.at_level(logging.ERROR):
        engine.generate("m", PROMPTS, PARAMS, SEEDS)
    first, *others = caplog.records
    assert first.exc_info is not None and "a forward pass of llama raised" in first.message
    assert others and all("sequences have failed: a forward pass of llama raised" in r.message for r in others)
