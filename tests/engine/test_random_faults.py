"""Random faults of several kinds in one run."""

from __future__ import annotations

from typing import Any

import pytest
from checks import PAGE, assert_nothing_is_held, assert_same, finish
from faults import PARAMS, PROMPTS, RESPOND, SEEDS, is_hit, probed, raises_at, runs_out_above, to_target, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Tracer, traced

from alignpro.engine import (
    Completion,
    Engine,
    Request,
    attention_plan,
    derive_seed,
    fault_isolation,
    host_copy,
    plan_buffers,
    runner,
    sampler,
    static_plan,
    stopping,
)
from alignpro.models.language_model import LanguageModel


@given(
    pages=st.integers(8, 24),
    budget=st.sampled_from([3, 20, 4096]),
    max_batch=st.integers(1, 9),
    shapes=st.sampled_from([None, "padded"]),
    ahead=st.booleans(),
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
    ahead: bool,
    bad: set[int],
    room: int,
    hiccups: set[int],
    chosen: list[int],
) -> None:
    """Tokens that raise in either stage, too little memory, and occasional errors of whole forward passes."""
    models = {"policy": llama, "target": target}
    inputs = [PROMPTS[i] for i in chosen]
    settings: Any = {
        "rewrite": PARAMS,
        "to_target": to_target,
        "respond": RESPOND,
        "seeds": [SEEDS[i] for i in chosen],
    }
    free = Engine(models).run_chains(inputs, **settings)
    engine = probed(
        models,
        pool_bytes=3 * pages * PAGE,
        token_budget=budget,
        max_batch=max_batch,
        cuda_graphs=shapes,
        async_scheduling=ahead,
    )
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


COMPUTING = (runner, sampler, stopping, attention_plan, host_copy, plan_buffers, static_plan, fault_isolation)
"""The modules of a forward pass and of sampling."""
ERRORS = (MemoryError, StopIteration, OSError, RuntimeError)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_error_at_any_instruction_of_a_pass_or_a_draw_fails_only_sequences(
    llama: LanguageModel, free: list[list[Completion]], count: int, ahead: bool
) -> None:
    engine = probed({"m": llama}, pool_bytes=24 * PAGE, async_scheduling=ahead)
    tracer = Tracer(COMPUTING)
    sample_with(engine, tracer)
    # A seed's state is computed when a sequence begins to run, before any pass.
    places = [each for each in tracer.seen.items() if each[0][0].co_name not in ("seed_state", "_mix")]
    draws = [each for each in places if each[0][0].co_name in ("_draw", "add_drawn", "_end_if_stopped", "find_end")]
    failed = 0
    for i in range(count):
        chosen = places if i % 2 else draws
        place, times = chosen[derive_seed(1, i) % len(chosen)]
        engine.weights_updated("m")
        requests = sample_with(
            engine, Tracer(COMPUTING, ERRORS[i // 2 % len(ERRORS)], place, derive_seed(2, i) % times)
        )
        assert_nothing_is_held(engine)
        for request, group in zip(requests, free, strict=False):
            for one, expected in zip(request.completions, group, strict=True):
                if one.error is None:
                    assert_same(one, expected)
                else:
                    failed += 1
                    assert "a fault" in one.error or "generator raised StopIteration" in one.error
    assert 0 < failed < 3 * count


def sample_with(engine: Engine, tracer: Tracer) -> list[Request]:
    """Sample two prompts, with the tracer in all steps."""
    requests = [engine.submit("m", prompt, PARAMS, seed) for prompt, seed in zip(PROMPTS[:2], SEEDS[:2], strict=True)]
    with traced(tracer):
        finish(engine)
    return requests
