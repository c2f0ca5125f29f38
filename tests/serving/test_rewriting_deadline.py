"""The deadline of a rewrite: kept to the millisecond while the engine computes, and what is given up is computed no further."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from rewriting_runs import ask, served, with_rewriter

from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.rewriter import PromptRewriter

DEADLINE = 0.03
STEP = 0.4


def _compute(seconds: float) -> None:
    """Keep the interpreter busy, as the engine's own Python does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(("hold", "late"), [(time.sleep, 0.02), (_compute, 0.06)])
def test_a_rewrite_is_given_up_at_its_deadline_whatever_the_engine_does(
    hold: Callable[[float], None], late: float
) -> None:
    """A step that takes longer than all deadlines together; the machine may be busy, so the best of four counts."""
    run = served()
    passes = 0

    def block(*_: object) -> None:
        nonlocal passes
        passes += 1
        hold(STEP)

    async def use(rewriter: PromptRewriter, engine: EngineThread) -> list[float]:
        run.prompter.model.causal.get_input_embeddings().register_forward_pre_hook(block)
        seconds = []
        for number in range(4):
            asked = ask(f"prompt {number}")
            outcome = await rewriter.rewrite(asked)
            assert (outcome.skipped, outcome.body, outcome.rewrite) == ("deadline", asked.raw, None)
            seconds.append(outcome.seconds)
        assert engine.waiting(run.name) == 0
        return seconds

    seconds = with_rewriter(run, use, deadline_ms=1000 * DEADLINE)
    assert min(seconds) >= DEADLINE
    assert min(seconds) < DEADLINE + late, seconds
    assert sum(seconds) < 4 * DEADLINE + STEP, seconds
    assert passes == 1  # the one that was under way
