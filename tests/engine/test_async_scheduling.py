"""A pass that is launched before the tokens of the pass before it are known: nothing that is sampled depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from checks import (
    TOKEN,
    assert_completions,
    assert_nothing_is_held,
    assert_same_chains,
    assert_same_groups,
    finish,
)
from faults import PARAMS, PROMPTS, RESPOND, SEEDS, probed, raises_at, submit_all, to_target, watched
from tiny_models import tiny_adapted, tiny_language_model
from torch import Tensor

from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.engine.async_scheduling import AsyncScheduling
from alignpro.engine.runner import Drawn, _put_drawn
from alignpro.engine.scheduler import Batch
from alignpro.engine.stats import EngineStats
from alignpro.models.language_model import LanguageModel

UNENDING = SamplingParams(max_tokens=14, n=3)
"""All sequences end at their greatest length, which is known in advance."""


def ahead_of(engine: Engine) -> AsyncScheduling:
    """Return what runs ahead on an engine's only device."""
    (worker,) = engine.workers.values()
    assert worker._ahead is not None
    return worker._ahead


@contextmanager
def launches(engine: Engine) -> Iterator[list[bool]]:
    """Record for each attempt whether a pass was launched."""
    ahead, made = ahead_of(engine), list[bool]()
    launch = ahead.launch

    def watching(batch: Batch, drawn: list[Drawn], stats: EngineStats) -> None:
        launch(batch, drawn, stats)
        made.append(ahead.has_pass)

    ahead.launch = watching  # type: ignore[assignment, method-assign]
    try:
        yield made
    finally:
        ahead.launch = launch  # type: ignore[method-assign]


@pytest.mark.parametrize("params", [UNENDING, PARAMS], ids=["known ends", "stop tokens"])
def test_no_bit_changes(any_model: LanguageModel, params: SamplingParams) -> None:
    """Except in models without the fused decoder: a row that is computed in vain changes the order of their sums."""
    plain, engine = (Engine({"m": any_model}, async_scheduling=ahead, audit=True) for ahead in (False, True))
    expected = plain.generate("m", PROMPTS, params, SEEDS)
    with launches(engine) as made:
        groups = engine.generate("m", PROMPTS, params, SEEDS)
    assert_same_groups(groups, expected)
    if params is UNENDING or any_model.name in ("llama", "qwen2", "qwen3", "mistral"):
        assert groups == expected
    assert sum(made) >= params.max_tokens - 2
    computed, others = engine.stats.computed, plain.stats.computed
    assert computed["decode"] == others["decode"] and computed["prefill"] == others["prefill"]
    assert (computed["wasted"] > 0) == (params is PARAMS) and others["wasted"] == 0
    assert engine.stats.sampled_tokens == plain.stats.sampled_tokens


def test_every_step_but_the_last_launches_a_pass(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, async_scheduling=True, audit=True)
    with launches(engine) as made:
        engine.generate("m", PROMPTS, UNENDING, SEEDS)
    assert made == [*[True] * (UNENDING.max_tokens - 1), False]
    assert engine.stats.computed["wasted"] == 0 and engine.stats.ticks == UNENDING.max_tokens


@pytest.mark.parametrize("shapes", [None, "padded"])
def test_waiting_sequences_are_admitted_in_passes_that_are_launched_ahead(
    llama: LanguageModel, free: list[list[Completion]], shapes: Any
) -> None:
    """Where their prompts are computed apart; in a pass of both, the tokens of the others must be known."""
    engine = Engine({"m": llama}, max_batch=5, token_budget=40, cuda_graphs=shapes, async_scheduling=True, audit=True)
    with launches(engine) as made:
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS, SEEDS), free)
    steps = len(made)
    assert sum(made) > (0.9 if shapes else 0.5) * steps
    assert engine.stats.computed["prefill"] < sum(map(len, PROMPTS)) and engine.stats.computed["wasted"] > 0


def test_a_pass_is_not_launched_without_pages_for_all(
    llama: LanguageModel, free: list[list[Completion]], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine({"m": llama}, pool_bytes=22 * 4 * TOKEN, page_tokens=4, async_scheduling=True, audit=True)
    with launches(engine) as made:
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert_same_groups(groups, free)
    assert engine.stats.preemptions > 0 and True in made and False in made
    assert not caplog.records


def test_both_models_of_a_shared_pass_draw_before_the_next_one() -> None:
    """Each with parameters of its own, so that the tokens of a pass come from two draws."""
    policy = tiny_adapted(size=0.1).requires_grad_(False)
    models = {"policy": policy, "target": policy.without_adapter()}

    def run(ahead: bool) -> tuple[list[list[Completion]], list[bool]]:
        engine, made = Engine(models, async_scheduling=ahead, audit=True), list[bool]()
        inputs = [("policy", [*PROMPTS[0], *policy.invocation]), ("target", PROMPTS[1]), ("target", PROMPTS[2])]
        how = [UNENDING, RESPOND, SamplingParams(max_tokens=12, top_p=0.9)]
        requests = [engine.submit(*each, params, seed=3) for each, params in zip(inputs, how, strict=True)]
        with launches(engine) if ahead else nullcontext(made) as made:
            finish(engine)
        return [request.completions for request in requests], made

    (groups, made), (expected, _) = run(ahead=True), run(ahead=False)
    assert_same_groups(groups, expected)
    assert sum(made) > 8


def test_chains(llama: LanguageModel, target: LanguageModel) -> None:
    """Their tails overlap, so that passes of both models are launched in turn."""

    def run(**options: Any) -> tuple[Engine, list[list[Chain]]]:
        engine = Engine({"policy": llama, "target": target}, max_batch=20, audit=True, **options)
        settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
        return engine, engine.run_chains(PROMPTS, **settings)

    (plain, expected), (engine, chains) = run(), run(async_scheduling=True, cuda_graphs="padded")
    assert_same_chains(chains, expected)
    assert_nothing_is_held(engine)
    for kind in ("prefill", "decode", "recompute"):
        assert engine.stats.computed[kind] == plain.stats.computed[kind]


def test_top_logprobs_and_stop_texts(llama: LanguageModel, free: list[list[Completion]]) -> None:
    tokenizer = llama.tokenizer
    stop = tokenizer.decode(free[0][0].tokens[4:6])
    params = SamplingParams(max_tokens=14, n=3, stop=(stop,), top_logprobs=2)
    expected, groups = (
        Engine({"m": llama}, async_scheduling=ahead).generate("m", PROMPTS, params, SEEDS) for ahead in (False, True)
    )
    assert groups == expected
    assert {one.finish_reason for group in groups for one in group} == {"stop", "length"}
    assert all(len(one.model_logprobs) == len(one.tokens) for group in groups for one in group)


@pytest.mark.parametrize(
    ("rows", "ids"),
    [([4, 2, 7], [14, 12, 17, 0]), ([7, 4], [17, 14, 3, 0]), ([5, 2, 6], [1, 12, 3, 0]), ([5, 6], [1, 2, 3, 0])],
    ids=["all", "some", "and others", "others alone"],
)
def test_drawn_tokens_are_put_where_their_rows_are(rows: list[int], ids: list[int]) -> None:
    """A sequence that was preempted with one token decodes at once when it is admitted again: its token is known."""
    drawn = [
        Drawn(cast(Any, None), np.array(drew), torch.tensor(drew) + 10, cast(Any, None), []) for drew in ([4, 2], [7])
    ]
    known = torch.tensor([1, 2, 3, 0])
    _put_drawn(drawn, np.array(rows), known)
    assert known.tolist() == ids


class TestBetweenSteps:
    """A pass has been launched, and its draw has not."""

    @staticmethod
    def begun(llama: LanguageModel, steps: int = 3) -> tuple[Engine, Any]:
        engine = probed({"m": llama}, async_scheduling=True)
        requests = [engine.submit("m", prompt, UNENDING, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
        for _ in range(steps):
            engine.step()
        assert ahead_of(engine).has_pass
        return engine, requests

    def test_all_tokens_but_those_of_the_launched_pass_can_be_read(self, llama: LanguageModel) -> None:
        engine, requests = self.begun(llama)
        assert [len(one.output_ids) for request in requests for one in request.sequences] == [3] * 18
        assert engine.stats.computed["decode"] == 2 * 18, "the launched pass does not count yet"

    def test_a_cancelled_request_is_not_drawn_for(self, llama: LanguageModel) -> None:
        engine, requests = self.begun(llama)
        engine.cancel(requests[1])
        new = engine.submit("m", PROMPTS[1], UNENDING, SEEDS[1])  # takes the freed pages and rows
        assert engine.step() == [] and engine.stats.computed["wasted"] == 3
        assert [len(one.tokens) for one in requests[1].completions] == [3] * 3
        assert set(finish(engine)) == {*requests[:1], *requests[2:], new}
        expected = Engine({"m": llama}).generate("m", PROMPTS, UNENDING, SEEDS)
        assert_completions([requests[0], new, *requests[2:]], expected)

    def test_a_request_whose_prompt_is_in_the_launched_pass_can_be_cancelled(self, llama: LanguageModel) -> None:
        engine = probed({"m": llama}, async_scheduling=True, cuda_graphs="padded")
        expected = Engine({"m": llama}).generate("m", PROMPTS, UNENDING, SEEDS)
        first = engine.submit("m", PROMPTS[0], UNENDING, SEEDS[0])
        for _ in range(3):
            engine.step()
        second, third = (engine.submit("m", PROMPTS[i], UNENDING, SEEDS[i]) for i in (1, 2))
        engine.step()
        launched = ahead_of(engine)._launched
        assert launched is not None and {one.request for one in launched.batch.drawing} == {second, third}
        engine.cancel(second)
        engine.step()
        assert [len(one.output_ids) for request in (first, third) for one in request.sequences] == [5] * 3 + [1] * 3
        again = engine.submit("m", PROMPTS[1], UNENDING, SEEDS[1])  # what was computed of its prompt is valid
        assert set(finish(engine)) == {first, third, again}
        assert [len(one.tokens) for one in second.completions] == [0] * 3
        assert_completions([first, again, third], expected[:3])

    def test_all_that_a_launched_pass_would_draw_for_can_be_cancelled(self, llama: LanguageModel) -> None:
        """Its chunk of a prompt stays."""
        engine = probed({"m": llama}, async_scheduling=True, cuda_graphs="padded", token_budget=7)
        first = engine.submit("m", PROMPTS[0], UNENDING, SEEDS[0])
        while not first.sequences[0].output_ids:
            engine.step()
        second = engine.submit("m", PROMPTS[1], UNENDING, SEEDS[1])
        engine.step()
        launched = ahead_of(engine)._launched
        assert launched is not None and launched.batch.chunks and not launched.batch.drawing
        engine.cancel(first)
        assert ahead_of(engine).has_pass
        before = engine.stats.computed["prefill"]
        assert engine.step() == [] and engine.stats.computed["prefill"] == before
        assert finish(engine) == [second]
        assert_completions([second], Engine({"m": llama}).generate("m", PROMPTS[1:2], UNENDING, SEEDS[1:2]))

    def test_nothing_is_left_when_the_last_request_is_cancelled(self, llama: LanguageModel) -> None:
        engine, requests = self.begun(llama)
        for request in requests:
            engine.cancel(request)
        assert not ahead_of(engine).has_pass and engine.stats.computed["wasted"] == 18
        engine.weights_updated("m")
        engine.release()
        assert engine.pools[llama.device].arena_bytes == 0 and engine.step() == []

    def test_nothing_is_left_when_all_sequences_end_unexpectedly(self, llama: LanguageModel) -> None:
        engine = probed({"m": llama}, async_scheduling=True)
        greedy = SamplingParams(max_tokens=30, temperature=0.0)
        ((drawn,),) = engine.generate("m", PROMPTS[:1], greedy)
        before = engine.stats.snapshot()
        last = next(i for i, token in enumerate(drawn.tokens) if i > 3 and token not in drawn.tokens[:i])
        stopping = SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=(drawn.tokens[last],))
        ((stopped,),) = engine.generate("m", PROMPTS[:1], stopping)
        assert stopped.tokens == drawn.tokens[: last + 1] and stopped.finish_reason == "stop"
        assert not ahead_of(engine).has_pass
        assert engine.stats.since(before).computed["wasted"] == 1

    def test_an_interrupt_forgets_the_pass(self, llama: LanguageModel, free: list[list[Completion]]) -> None:
        engine, requests = self.begun(llama)

        def interrupt(_: Tensor) -> None:
            raise KeyboardInterrupt

        with watched(llama, interrupt), pytest.raises(KeyboardInterrupt):
            engine.step()
        assert not ahead_of(engine).has_pass
        assert set(finish(engine)) == set(requests)
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS, SEEDS), free)


class TestAPassThatRaises:
    """It is computed anew once the tokens before it are known."""

    def test_an_error_that_does_not_recur_changes_nothing_and_is_logged(
        self, llama: LanguageModel, free: list[list[Completion]], caplog: pytest.LogCaptureFixture
    ) -> None:
        passes = iter(range(1000))

        def check(_: Tensor) -> None:
            if next(passes) in (3, 6):
                raise OSError("a hiccup")

        engine = probed({"m": llama}, async_scheduling=True)
        with watched(llama, check), launches(engine) as made:
            groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert_same_groups(groups, free)
        assert made[:6] == [True, True, False, True, False, True]
        assert caplog.text.count("OSError: a hiccup") == 2

    def test_after_lack_of_memory_no_pass_is_launched_until_the_next_run(
        self, llama: LanguageModel, free: list[list[Completion]]
    ) -> None:
        passes = iter(range(1000))

        def check(_: Tensor) -> None:
            if next(passes) == 3:
                raise torch.OutOfMemoryError("no memory")

        engine = probed({"m": llama}, async_scheduling=True)
        with watched(llama, check), launches(engine) as made:
            assert_same_groups(engine.generate("m", PROMPTS, PARAMS, SEEDS), free)
            assert made == [True, True, *[False] * (PARAMS.max_tokens - 2)]
            (worker,) = engine.workers.values()
            assert worker._executor.max_tokens is None, "the pass did fit without the one before it"
            assert_same_groups(engine.generate("m", PROMPTS, PARAMS, SEEDS), free)
            assert sum(made) > 10

    def test_a_lost_device_ends_the_run(self, llama: LanguageModel, free: list[list[Completion]]) -> None:
        passes = iter(range(1000))

        def check(_: Tensor) -> None:
            if next(passes) == 3:
                raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        engine = probed({"m": llama}, async_scheduling=True)
        with watched(llama, check), pytest.raises(torch.AcceleratorError):
            engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert_nothing_is_held(engine)
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS, SEEDS), free)

    def test_an_error_of_a_drawn_token_fails_its_sequences_alone(
        self, llama: LanguageModel, free: list[list[Completion]], drawn_by_some: int
    ) -> None:
        engine = probed({"m": llama}, async_scheduling=True, cuda_graphs="padded")
        requests = submit_all(engine)
        with watched(llama, raises_at(drawn_by_some)):
            finish(engine)
        failed = [one.error for request in requests for one in request.completions if one.error]
        assert 0 < len(failed) < 18 and set(failed) == {
            f"a forward pass of llama raised ValueError: token {drawn_by_some} is poison"
        }


def test_the_host_waits_by_default_on_a_cpu(llama: LanguageModel) -> None:
    engine = probed({"m": llama})
    (worker,) = engine.workers.values()
    assert worker._ahead is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnAGpu:
    """Passes, copies and draws follow each other on one stream, and the host waits for an event."""

    @pytest.mark.parametrize("graphs", [True, False])
    @pytest.mark.parametrize("params", [UNENDING, PARAMS], ids=["known ends", "stop tokens"])
    def test_nothing_that_is_sampled_changes(self, graphs: bool, params: SamplingParams) -> None:
        model = tiny_language_model("llama").cuda()
        plain, engine = (
            Engine({"m": model}, cuda_graphs=graphs, async_scheduling=ahead, audit=True) for ahead in (False, None)
        )
        expected = plain.generate("m", PROMPTS, params, SEEDS)
        with launches(engine) as made:
            for _ in range(2):  # the second run replays the graphs that the first has captured
                assert_same_groups(engine.generate("m", PROMPTS, params, SEEDS), expected, tolerance=1e-4)
        assert sum(made) >= 2 * (params.max_tokens - 2), "it is the default"

    def test_launching_a_replay_never_waits_for_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = Engine({"m": tiny_language_model("llama").cuda()}, cuda_graphs=True)
        expected = engine.generate("m", PROMPTS, UNENDING, SEEDS)
        engine.generate("m", PROMPTS, UNENDING, SEEDS)  # all shapes have been captured
        launch, captured = AsyncScheduling.launch, engine.stats.decode_ticks["captured"]

        def unwaiting(*arguments: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                launch(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(AsyncScheduling, "launch", unwaiting)
        assert_same_groups(engine.generate("m", PROMPTS, UNENDING, SEEDS), expected, tolerance=1e-4)
        assert engine.stats.decode_ticks["captured"] == captured
