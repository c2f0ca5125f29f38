"""An interrupt at any instruction of the bookkeeping leaves an engine that is whole and samples the right tokens."""

from __future__ import annotations

import pytest
from checks import TOKEN, assert_nothing_is_held, assert_same_groups, finish
from faults import PROMPTS, SEEDS, TEMPLATE
from tiny_models import ragged
from tracing import Place, Tracer, traced

from alignpro.engine import (
    Completion,
    Engine,
    SamplingParams,
    arena,
    async_scheduling,
    cpp_sequence_arrays,
    derive_seed,
    pool,
    prefix_tree,
    scheduler,
    sequence_arrays,
    sequence_table,
)
from alignpro.models.language_model import LanguageModel

BOOKKEEPING = (
    *(arena, pool, prefix_tree, scheduler, async_scheduling),
    *(sequence_table, sequence_arrays, cpp_sequence_arrays),
)
SHORT = SamplingParams(max_tokens=6, n=2)
GROUPS = [*PROMPTS[:3], PROMPTS[0][:24], TEMPLATE[:6], ragged(1, 60, shortest=40, longest=40, seed=3)[0]]
"""Prompts that share long, short and no beginnings, so that nodes are split, pages copied, moved and evicted."""
GROUP_SEEDS = SEEDS


def small_engine(models: dict[str, LanguageModel]) -> Engine:
    """Return an engine whose pool is too small for all sequences at once; some passes are launched ahead."""
    engine = Engine(models, pool_bytes=22 * 4 * TOKEN, page_tokens=4, max_batch=7, async_scheduling=True)
    assert engine.workers
    return engine


def work(engine: Engine) -> None:
    """Use every part of the bookkeeping: chains of calls, preemption, cancellation, release, changed weights."""
    engine.generate("m", GROUPS, SHORT, GROUP_SEEDS)
    request = engine.submit("m", GROUPS[0], SHORT, GROUP_SEEDS[0])
    engine.submit("m", GROUPS[1], SHORT, GROUP_SEEDS[1])
    engine.step()
    engine.cancel(request)
    while engine.num_unfinished_requests:
        engine.step()
    engine.release(keep=["m"])
    engine.weights_updated("m")


@pytest.fixture(scope="module")
def expected(llama: LanguageModel) -> list[list[Completion]]:
    return Engine({"m": llama}).generate("m", GROUPS, SHORT, GROUP_SEEDS)


@pytest.fixture(scope="module")
def places(llama: LanguageModel) -> dict[Place, int]:
    """Return the instructions that the work runs, with how often it runs each."""
    tracer = Tracer(BOOKKEEPING)
    engine = small_engine({"m": llama})
    with traced(tracer):
        work(engine)
    assert engine.stats.preemptions > 0
    assert {"drop_if_needless", "schedule_ahead", "presume"} <= {code.co_name for code, _ in tracer.seen}
    return tracer.seen


def assert_whole(engine: Engine, expected: list[list[Completion]]) -> None:
    """Check that every page is accounted for and that the engine samples what a new one would."""
    finish(engine)  # requests that the interrupt has failed
    (worker,) = engine.workers.values()
    assert_nothing_is_held(engine)
    worker.scheduler.audit()
    assert_same_groups(engine.generate("m", GROUPS, SHORT, GROUP_SEEDS), expected)
    worker.scheduler.audit()


def interrupt_at(
    llama: LanguageModel, places: dict[Place, int], expected: list[list[Completion]], chosen: slice
) -> int:
    """Interrupt the work at each chosen instruction, at any of the times that it is run; return how many there are."""
    points = list(places.items())[chosen]
    for i, (place, count) in enumerate(points):
        engine = small_engine({"m": llama})  # as when the instructions were counted
        with (
            pytest.raises(KeyboardInterrupt),
            traced(Tracer(BOOKKEEPING, KeyboardInterrupt, place, derive_seed(i) % count)),
        ):
            work(engine)
        assert_whole(engine, expected)
    return len(points)


def test_an_interrupt_in_the_bookkeeping_leaves_the_pool_whole(
    llama: LanguageModel, places: dict[Place, int], expected: list[list[Completion]]
) -> None:
    assert interrupt_at(llama, places, expected, slice(5, None, 80)) > 30


@pytest.mark.slow
def test_an_interrupt_at_any_instruction_of_the_bookkeeping_leaves_the_pool_whole(
    llama: LanguageModel, places: dict[Place, int], expected: list[list[Completion]]
) -> None:
    assert interrupt_at(llama, places, expected, slice(None)) > 900


def test_submitted_requests_fail_when_a_step_is_interrupted_and_are_returned_once(
    llama: LanguageModel, places: dict[Place, int], expected: list[list[Completion]]
) -> None:
    engine = small_engine({"m": llama})
    requests = [engine.submit("m", prompt, SHORT, seed) for prompt, seed in zip(GROUPS, GROUP_SEEDS, strict=True)]
    engine.step()
    (worker,) = engine.workers.values()
    place = next(place for place in places if place[0].co_name == "_build_batch")
    with pytest.raises(KeyboardInterrupt), traced(Tracer(BOOKKEEPING, KeyboardInterrupt, place)):
        engine.step()
    assert finish(engine) == requests
    assert {one.error for request in requests for one in request.completions} == {
        "generation raised KeyboardInterrupt: a fault"
    }
    assert worker.pool.num_free == worker.pool.total
    assert_whole(engine, expected)


def test_a_change_that_was_never_completed_is_undone_by_the_next_call(
    llama: LanguageModel, expected: list[list[Completion]]
) -> None:
    """As when the interrupt arrives after the last instruction that could have reacted to it."""
    engine = small_engine({"m": llama})
    request = engine.submit("m", GROUPS[0], SHORT, GROUP_SEEDS[0])
    engine.step()
    engine._changing = True
    (worker,) = engine.workers.values()
    worker.tree.num_locked += 1  # half of a change
    assert engine.step() == [request]
    assert {one.error for one in request.completions} == {"generation was interrupted"}
    assert_whole(engine, expected)
