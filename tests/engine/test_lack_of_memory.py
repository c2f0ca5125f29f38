"""Less memory than expected: forward passes and pools shrink, and only sequences that do not fit fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import PAGE, assert_nothing_is_held, assert_same
from faults import PARAMS, PROMPTS, SEEDS, assert_failed_alone, is_hit, probed, runs_out_above, watched
from torch import Tensor

from alignpro.engine import Completion, Engine
from alignpro.models.language_model import LanguageModel


@pytest.mark.parametrize(
    "options", [{}, {"pool_bytes": 8 * PAGE}, {"cuda_graphs": "padded"}, {"async_scheduling": True}]
)
@pytest.mark.parametrize("room", [1, 5, 40])
def test_forward_passes_shrink_to_the_available_memory(
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
    assert sum(size > room for size in sizes) <= 10 < len(sizes)  # the limit is found once, and not in every step
    assert sum("out of memory" in record.message for record in caplog.records) == 1
    assert_nothing_is_held(engine)


def test_a_sequence_without_enough_memory_fails_alone(
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
    assert max(sizes[-5:]) > 1  # the other sequences' passes do not shrink
    assert_nothing_is_held(engine)


class TestPool:
    """A device with less memory than the configured pool."""

    @staticmethod
    def engine(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, pages: int) -> Engine:
        engine = Engine({"m": model}, audit=True)
        arena = engine.pools[model.device]._arena
        resize = arena.resize

        def limited(count: int, total: int) -> None:
            if count > pages:
                raise torch.OutOfMemoryError("no memory for the arena")
            resize(count, total)

        monkeypatch.setattr(arena, "resize", limited)
        return engine

    @pytest.mark.parametrize("pages", [8, 20])
    def test_it_shrinks_to_the_available_memory(
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
        (worker,) = engine.workers.values()
        assert pages // 2 <= worker.pool.total <= pages
        assert sum("has memory for" in record.message for record in caplog.records) == 1
        assert_nothing_is_held(engine)

    @pytest.mark.parametrize("pages", [0, 1, 2, 3, 4])
    def test_sequences_that_do_not_fit_fail(
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
                    assert f"only {engine.pools[llama.device].total} pages" in one.error
                    assert needed > pages // 2
        assert_nothing_is_held(engine)
        monkeypatch.undo()  # memory is available again
        assert assert_failed_alone(engine.generate("m", PROMPTS, PARAMS, SEEDS), free, PROMPTS, []) == 0

    def test_a_released_pool_that_cannot_be_allocated_whole_grows_on_demand(
        self, llama: LanguageModel, free: list[list[Completion]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = probed({"m": llama})
        engine.generate("m", PROMPTS, PARAMS, SEEDS)
        (worker,) = engine.workers.values()
        engine.release(keep=["m"])
        pool, arena = worker.pool, worker.pool._arena
        resize, kept = arena.resize, pool.total - pool.num_free

        def limited(count: int, total: int) -> None:
            if count > 2 * kept:
                raise torch.OutOfMemoryError("no memory for the arena")
            resize(count, total)

        monkeypatch.setattr(arena, "resize", limited)
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert assert_failed_alone(groups, free, PROMPTS, []) == 0
        assert_nothing_is_held(engine)

    def test_a_pool_larger_than_memory_grows_on_demand(
        self, llama: LanguageModel, free: list[list[Completion]]
    ) -> None:
        engine = Engine({"m": llama}, pool_bytes=1 << 56, audit=True)
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
        assert assert_failed_alone(groups, free, PROMPTS, []) == 0
        assert_nothing_is_held(engine)
