"""Decode steps without graphs: plans that stay give what passes over chunks give, and steps of one batch share them."""

from __future__ import annotations

import pytest
from checks import assert_same_groups
from tiny_models import ragged, tiny_language_model

from alignpro.config import AdapterConfig
from alignpro.engine import Completion, Engine, SamplingParams, sequence_table, static_plan
from alignpro.engine.sequence_arrays import SequenceArrays
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel

TEMPLATE = ragged(1, 100, shortest=20, longest=20, seed=5)[0]
PROMPTS = [[1], *(TEMPLATE + tail for tail in ragged(4, 100, shortest=1, longest=30, seed=6))]
PARAMS = SamplingParams(max_tokens=24, n=2, stop_token_ids=(0, 1, 2, 3))


def run(engine: Engine, names: list[str], *, in_chunks: bool) -> list[list[Completion]]:
    """Sample from a model for each prompt; with ``in_chunks``, all passes are over chunks, one token each."""
    requests = [engine.submit(name, prompt, PARAMS, seed=3) for name, prompt in zip(names, PROMPTS, strict=True)]
    (worker,) = engine.workers.values()
    worker._executor.max_tokens = 0 if in_chunks else None
    while engine.num_unfinished_requests:
        engine.step()
    assert (len(worker._executor._plans) == 0) == in_chunks
    return [request.completions for request in requests]


def test_plans_that_stay_give_what_passes_over_chunks_give(llama: LanguageModel) -> None:
    names = ["m"] * len(PROMPTS)
    planned, plain = (Engine({"m": llama}, page_tokens=4, audit=True) for _ in range(2))
    assert_same_groups(run(planned, names, in_chunks=False), run(plain, names, in_chunks=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_an_adapter_on_some_rows_gives_what_passes_over_chunks_give(ahead: bool) -> None:
    model = add_adapter(tiny_language_model("llama"), AdapterConfig(kind="lora", rank=2)).requires_grad_(False)
    models = {"policy": model, "base": model.without_adapter()}
    names = ["policy", "base", "policy", "base", "base"]
    planned, plain = (Engine(models, async_scheduling=ahead, audit=True) for _ in range(2))
    assert_same_groups(run(planned, names, in_chunks=False), run(plain, names, in_chunks=True))
    (worker,) = planned.workers.values()
    actives = {plan.shape.active for plan in worker._executor._plans.by_shape.values()}
    assert any(active > 0 for active in actives), "some steps computed rows of both models"


def test_plans_in_numpy_give_what_those_of_the_operators_give(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, (fast, plain) = ["m"] * len(PROMPTS), (Engine({"m": llama}, page_tokens=4, audit=True) for _ in range(2))
    expected = run(fast, names, in_chunks=False)
    monkeypatch.setattr(sequence_table, "new_sequence_arrays", SequenceArrays)
    assert run(plain, names, in_chunks=False) == expected
    (worker,) = plain.workers.values()
    assert type(worker.scheduler.table.arrays) is SequenceArrays


def test_steps_of_one_batch_share_a_plan_without_padding(llama: LanguageModel) -> None:
    engine = Engine({"m": llama})
    engine.generate("m", PROMPTS[1:4], SamplingParams(max_tokens=30))
    (worker,) = engine.workers.values()
    assert {plan.shape.rows for plan in worker._executor._plans.by_shape.values()} == {3}
    assert len(worker._executor._plans) <= 3, "one for each width of the page table"
    assert engine.stats.decode_ticks == {}, "shapes are not fixed"


def test_the_width_that_a_long_prompt_needed_is_given_up(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not soon: shapes recur."""
    monkeypatch.setattr(static_plan, "WIDTHS_KEPT", 10)
    engine, short = Engine({"m": llama}, page_tokens=4), [[1], [2]]
    engine.generate("m", [list(range(1, 61))], SamplingParams(max_tokens=3))
    engine.generate("m", short, SamplingParams(max_tokens=6))
    (worker,) = engine.workers.values()
    assert newest_widths(worker._executor._plans)[0] == 16
    engine.generate("m", short, SamplingParams(max_tokens=30))
    assert newest_widths(worker._executor._plans) == [1, 8]


def newest_widths(plans: static_plan.StaticPlans) -> list[int]:
    """The widths of the page tables of the plan that was used last."""
    return [pages for _, pages in next(reversed(plans.by_shape.values())).shape.levels]
