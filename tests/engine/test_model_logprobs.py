"""The model's own log-probabilities of sampled tokens: those of a forward pass of transformers, however tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from checks import assert_nothing_is_held, assert_same
from faults import PARAMS, PROMPTS, SEEDS, probed
from tiny_models import tiny_language_model

from alignpro.engine import Completion, Engine, SamplingParams
from alignpro.engine.sequence_table import SequenceTable
from alignpro.models.language_model import LanguageModel

TOP = 4
RECORDED = replace(PARAMS, top_logprobs=TOP)
FILTERED = replace(RECORDED, temperature=0.6, top_k=9, top_p=0.9)


def assert_are_the_models(model: LanguageModel, prompt: Sequence[int], completion: Completion) -> None:
    """The records of a completion are those of one pass over prompt and completion."""
    assert [record.token for record in completion.model_logprobs] == completion.tokens
    ids = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        logits = model.causal(ids).logits[0, len(prompt) - 1 : -1]  # (T, V)
    expected = logits.log_softmax(-1)
    for row, record in zip(expected, completion.model_logprobs, strict=True):
        assert record.logprob == pytest.approx(float(row[record.token]), abs=1e-4)
        top = row.topk(TOP)
        assert [logprob for _, logprob in record.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in record.top] == pytest.approx(top.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("params", [RECORDED, FILTERED, replace(RECORDED, temperature=0.0, n=1)])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_they_are_those_of_a_forward_pass(architecture: str, params: SamplingParams) -> None:
    """Temperature and filters do not count; the logits of Gemma 2 are capped."""
    model = tiny_language_model(architecture)
    groups = Engine({"m": model}).generate("m", PROMPTS[:2], params, SEEDS[:2])
    for prompt, group in zip(PROMPTS, groups, strict=False):
        for completion in group:
            assert_are_the_models(model, prompt, completion)


def test_recording_changes_no_draw_and_is_for_those_who_ask(llama: LanguageModel, free: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, max_batch=8)
    requests = [engine.submit("m", prompt, RECORDED if i % 2 else PARAMS, SEEDS[i]) for i, prompt in enumerate(PROMPTS)]
    while engine.num_unfinished_requests:
        engine.step()
    for i, (request, expected) in enumerate(zip(requests, free, strict=True)):
        for one, other in zip(request.completions, expected, strict=True):
            assert_same(one, other)
            assert len(one.model_logprobs) == (len(one.tokens) if i % 2 else 0)


def test_a_draw_that_is_repeated_after_an_error_is_recorded_once(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Engine({"m": llama}).generate("m", PROMPTS, RECORDED, SEEDS)
    add_tokens, calls = SequenceTable.add_tokens, 0

    def broken(table: SequenceTable, rows: Any, *drawn: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0 and len(rows) > 1:
            raise ZeroDivisionError("no luck")
        return add_tokens(table, rows, *drawn)

    monkeypatch.setattr(SequenceTable, "add_tokens", broken)
    engine = probed({"m": llama})
    for group, others in zip(engine.generate("m", PROMPTS, RECORDED, SEEDS), expected, strict=True):
        for one, other in zip(group, others, strict=True):
            assert_same(one, other)
            assert [record.token for record in one.model_logprobs] == one.tokens
    assert calls > 10
    assert_nothing_is_held(engine)


def test_ever_new_temperatures_are_told_apart(llama: LanguageModel) -> None:
    """As clients of a server may ask for them, for as long as it runs."""
    params = [SamplingParams(max_tokens=3, temperature=0.5 + 0.01 * i) for i in range(90)]
    alone = [Engine({"m": llama}).generate("m", PROMPTS[:1], each, [i]) for i, each in enumerate(params)]
    engine = Engine({"m": llama}, max_batch=8)
    requests = [engine.submit("m", PROMPTS[0], each, i) for i, each in enumerate(params)]
    while engine.num_unfinished_requests:
        engine.step()
    for request, expected in zip(requests, alone, strict=True):
        assert_same(request.completions[0], expected[0][0])
    (worker,) = engine._workers.values()
    assert len(worker.scheduler.table._samplings) < 90
