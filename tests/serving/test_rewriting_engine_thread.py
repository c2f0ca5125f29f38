"""Generation on a thread of its own: what comes and goes while others run, and what remains after a failure."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import tiny_language_model

from alignpro.config import EngineConfig
from alignpro.engine import Completion, Engine, SamplingParams, derive_seed
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.serving.engine_thread import EngineFailedError, EngineThread

PARAMS = SamplingParams(max_tokens=12, temperature=1.0)
LONG = SamplingParams(max_tokens=48, temperature=1.0)
CONFIG = EngineConfig(pool_bytes=1 << 22)
PROMPTS = [[5, 17, 3], [5, 17, 3, 88], [41], [20, 21, 22, 23]]


def with_engine(model: LanguageModel, use: Callable[[EngineThread], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        engine = EngineThread({"m": model}, CONFIG)
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


@contextmanager
def broken(model: LanguageModel, error: BaseException, calls: int) -> Iterator[None]:
    """Let the model's passes raise, so many times."""
    left = calls

    def check(*_: object) -> None:
        nonlocal left
        if left:
            left -= 1
            raise error

    handle = model.causal.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def test_concurrent_requests_get_what_the_engine_gives_each_alone(llama: LanguageModel) -> None:
    async def use(engine: EngineThread) -> list[list[Completion]]:
        return await asyncio.gather(*(engine.complete("m", each, PARAMS, i) for i, each in enumerate(PROMPTS)))

    alone = Engine({"m": llama}, **CONFIG.model_dump())
    expected = [alone.generate("m", [each], PARAMS, [i])[0] for i, each in enumerate(PROMPTS)]
    assert [[each.tokens for each in group] for group in with_engine(llama, use)] == [
        [each.tokens for each in group] for group in expected
    ]


def test_draws_have_seeds_of_their_own(llama: LanguageModel) -> None:
    async def use(engine: EngineThread) -> list[Completion]:
        one = SamplingParams(max_tokens=12, temperature=1.0)
        ((whole,), (drawn,)) = await asyncio.gather(
            engine.complete("m", PROMPTS[0], one, 3),
            engine.complete("m", PROMPTS[0], one, draws=[derive_seed(3, 0)]),
        )
        return [whole, drawn]

    whole, drawn = with_engine(llama, use)
    assert whole == drawn


def test_tokens_come_before_the_end(llama: LanguageModel) -> None:
    async def use(engine: EngineThread) -> None:
        generation = engine.start("m", PROMPTS[0], LONG, streamed=True)
        lengths = [len(tokens[0]) async for tokens in generation.updates()]
        (completion,) = await generation.done
        assert lengths == sorted(set(lengths))
        assert 1 < len(lengths) < len(completion.tokens) + 1

    with_engine(llama, use)


def test_a_cancelled_request_is_gone_and_the_others_go_on(llama: LanguageModel) -> None:
    async def use(engine: EngineThread) -> None:
        kept = asyncio.create_task(engine.complete("m", PROMPTS[0], LONG, 1))
        tasks = [asyncio.create_task(engine.complete("m", PROMPTS[1], LONG, i)) for i in range(8)]
        await asyncio.sleep(0.005)
        assert engine.waiting("m") == 9
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
        assert engine.waiting("m") == 1
        (completion,) = await kept
        assert completion.finish_reason == "length"
        await engine.complete("m", PROMPTS[2], PARAMS)
        (inner,) = engine._engines
        assert (inner.num_unfinished_requests, len(engine._pending), len(engine._requests)) == (0, 0, 0)

    with_engine(llama, use)


def test_a_batch_that_raises_fails_its_requests_alone() -> None:
    model = tiny_language_model("llama")

    async def use(engine: EngineThread) -> None:
        with broken(model, ValueError("poison"), 2):
            (failed,) = await engine.complete("m", PROMPTS[0], PARAMS)
        assert failed.finish_reason == "error"
        assert "poison" in str(failed.error)
        (completion,) = await engine.complete("m", PROMPTS[0], PARAMS)
        assert completion.error is None
        assert engine.failure is None

    with_engine(model, use)


def test_a_lost_device_fails_all_requests_and_those_that_come_later() -> None:
    model = tiny_language_model("llama")

    async def use(engine: EngineThread) -> None:
        with broken(model, torch.AcceleratorError("CUDA error: gone"), 99):
            both = await asyncio.gather(
                *(engine.complete("m", each, PARAMS) for each in PROMPTS[:2]), return_exceptions=True
            )
        assert all(isinstance(each, EngineFailedError) and "CUDA error: gone" in str(each) for each in both)
        assert engine.failure is not None
        with pytest.raises(EngineFailedError, match="CUDA error: gone"):
            await engine.complete("m", PROMPTS[0], PARAMS)

    with_engine(model, use)


def test_an_engine_that_fails_again_and_again_is_given_up() -> None:
    model = tiny_language_model("llama")

    async def use(engine: EngineThread) -> None:
        with broken(model, RuntimeError("CUDA error: flaky"), 99):
            for _ in range(2):
                (failed,) = await engine.complete("m", PROMPTS[0], PARAMS)
                assert failed.finish_reason == "error"
            assert engine.failure is None
            with pytest.raises(EngineFailedError, match="flaky"):
                await engine.complete("m", PROMPTS[0], PARAMS)
        assert engine.failure is not None

    with_engine(model, use)


def test_models_are_replaced_while_requests_run(llama: LanguageModel) -> None:
    other = tiny_language_model("llama", seed=5)

    async def use(engine: EngineThread) -> None:
        running = [asyncio.create_task(engine.complete("m", each, LONG, i)) for i, each in enumerate(PROMPTS)]
        await asyncio.sleep(0.002)
        await engine.replace({"other": other}, lambda: None)
        (new,) = await engine.complete("other", PROMPTS[0], PARAMS)
        assert [each.finish_reason for (each,) in await asyncio.gather(*running)] == ["length"] * 4
        assert new == Engine({"m": other}).generate("m", PROMPTS[:1], PARAMS, [0])[0][0]
        with pytest.raises(EngineFailedError, match="no model m any more"):
            await engine.complete("m", PROMPTS[0], PARAMS)
        assert [list(each.models) for each in engine._engines] == [["other"]]

    with_engine(llama, use)


def test_what_cannot_run_does_not_replace_what_does(llama: LanguageModel) -> None:
    async def use(engine: EngineThread) -> None:
        model = tiny_language_model("llama")
        with broken(model, ValueError("does not run"), 9), pytest.raises(ModelError, match="does not run"):
            await engine.replace({"bad": model}, lambda: None)
        await engine.complete("m", PROMPTS[0], PARAMS)

    with_engine(llama, use)


def test_closing_fails_what_is_pending(llama: LanguageModel) -> None:
    async def use(engine: EngineThread) -> None:
        pending = asyncio.create_task(engine.complete("m", PROMPTS[0], LONG))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineFailedError, match="closed"):
            await pending

    with_engine(llama, use)


def test_random_cancellations_leak_no_page(llama: LanguageModel) -> None:
    chance = random.Random(0)

    async def client(engine: EngineThread) -> None:
        for _ in range(4):
            prompt = [chance.randrange(5, 90) for _ in range(chance.randrange(1, 60))]
            try:
                async with asyncio.timeout(chance.choice([0, 0.001, 0.01, 60])):
                    await engine.complete("m", prompt, PARAMS, chance.randrange(99))
            except TimeoutError:
                pass

    async def use(engine: EngineThread) -> None:
        await asyncio.gather(*(client(engine) for _ in range(12)))
        await engine.complete("m", [5], SamplingParams(max_tokens=1))
        (inner,) = engine._engines
        assert (inner.num_unfinished_requests, engine._pending, engine._requests) == (0, {}, {})
        inner.release()
        assert all(sum(pool.used.values()) == 0 for pool in inner.pools.values())

    with_engine(llama, use)
