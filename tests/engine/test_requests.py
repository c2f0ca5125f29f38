"""Requests that are submitted, cancelled and stepped one by one give the tokens of `generate`, and no page leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import PAGE, assert_completions, assert_nothing_is_held, assert_same, assert_same_chains, finish
from faults import PARAMS, PROMPTS, RESPOND, SEEDS, TEMPLATE, raises_at, submit_all, to_target, watched

from alignpro.engine import Completion, Engine, Request, SamplingParams, TokenPrompt
from alignpro.models.language_model import LanguageModel

LONG = SamplingParams(max_tokens=40, n=2)


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("options", [{}, {"max_batch": 4}, {"pool_bytes": 8 * PAGE}, {"token_budget": 7}])
def test_requests_may_arrive_between_any_two_steps(
    llama: LanguageModel, free: list[list[Completion]], options: dict[str, Any], every: int
) -> None:
    engine = Engine({"m": llama}, audit=True, **options)
    requests: list[Request] = []
    finished: list[Request] = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        requests.append(engine.submit("m", prompt, PARAMS, seed))
        for _ in range(every):
            finished += engine.step()
    finished += finish(engine)
    assert set(finished) == set(requests) and len(finished) == len(requests)  # each is returned once
    assert_completions(requests, free)
    assert engine.stats.sequences == 18
    assert engine.stats.sampled_tokens == sum(len(one.tokens) for group in free for one in group)


def test_a_request_that_cannot_run_is_returned_by_the_next_step(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, audit=True)
    bad = engine.submit("m", [], PARAMS)
    assert bad.finished and engine.num_unfinished_requests == 1
    engine.cancel(bad)  # it has finished already
    good = engine.submit("m", [1, 2], SamplingParams(max_tokens=1))
    assert engine.step() == [bad, good]
    assert {(one.finish_reason, one.error) for one in bad.completions} == {("error", "the prompt is empty")}
    assert engine.stats.sequences == 1


def test_completions_of_a_running_request_cannot_be_read(llama: LanguageModel) -> None:
    engine = Engine({"m": llama})
    request = engine.submit("m", [1, 2], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match=r"has not finished: call Engine\.step"):
        _ = request.completions


def test_the_models_are_fixed(llama: LanguageModel) -> None:
    engine = Engine({"m": llama})
    with pytest.raises(TypeError):
        engine.models["other"] = llama  # type: ignore[index]


def test_generate_and_chains_run_beside_submitted_requests(
    llama: LanguageModel, target: LanguageModel, free: list[list[Completion]]
) -> None:
    settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
    expected = Engine({"policy": llama, "target": target}).run_chains(PROMPTS, **settings)
    engine = Engine({"policy": llama, "target": target}, max_batch=7, audit=True)
    requests = submit_all(engine, "policy")
    engine.step()
    chains = engine.run_chains(PROMPTS, **settings)
    assert_same_chains(chains, expected)
    again = engine.generate("policy", PROMPTS, PARAMS, SEEDS)
    assert set(finish(engine)) == set(requests)
    assert_completions(requests, free)
    assert_completions(requests, again)


def test_chains_may_generate_with_the_same_engine(llama: LanguageModel, target: LanguageModel) -> None:
    """The callback of one chain asks the target, while the others are under way."""
    engine = Engine({"policy": llama, "target": target}, audit=True)
    greedy = SamplingParams(max_tokens=3, temperature=0.0)

    def ask(i: int, sample: Completion) -> TokenPrompt:
        ((answer,),) = engine.generate("target", [[1, *sample.tokens]], greedy)
        return TokenPrompt([1, *answer.tokens])

    settings: Any = {"rewrite": PARAMS, "respond": RESPOND, "seeds": SEEDS}
    chains = engine.run_chains(PROMPTS, to_target=ask, **settings)
    alone = Engine({"policy": llama, "target": target})
    for group in chains:
        for chain in group:
            ((answer,),) = alone.generate("target", [[1, *chain.sample.tokens]], greedy)
            assert chain.target_tokens == [1, *answer.tokens]
            assert [y.error for y in chain.responses] == [None] * RESPOND.n
    assert_nothing_is_held(engine)


def test_weights_and_memory_cannot_change_while_requests_are_pending(
    llama: LanguageModel, target: LanguageModel
) -> None:
    engine = Engine({"policy": llama, "target": target}, audit=True)
    request = engine.submit("target", PROMPTS[0], LONG)
    for _ in range(2):  # queued, then running
        with pytest.raises(RuntimeError, match="model target: its weights cannot change while it generates"):
            engine.weights_updated("target")
        with pytest.raises(RuntimeError, match="2 sequences are pending: the memory of the pools is in use"):
            engine.release()
        engine.weights_updated("policy")
        engine.step()
    assert finish(engine) == [request]
    engine.weights_updated("target")
    engine.release()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), torch.AcceleratorError("CUDA error: lost")], ids=["user", "gpu"]
)
def test_an_error_that_escapes_fails_all_pending_requests(
    llama: LanguageModel, free: list[list[Completion]], error: BaseException
) -> None:
    engine = Engine({"m": llama}, max_batch=7, audit=True)
    requests = submit_all(engine)
    finished: list[Request] = []
    while not finished:
        finished += engine.step()

    def fail(_: object) -> None:
        raise error

    with watched(llama, fail), pytest.raises(type(error)):
        engine.step()
    assert_nothing_is_held(engine)
    assert set(engine.step()) == set(requests) - set(finished) and engine.num_unfinished_requests == 0
    for request, group in zip(requests, free, strict=True):
        for one, other in zip(request.completions, group, strict=True):
            if one.error is None:
                assert_same(one, other)
            else:
                assert request not in finished
                assert one.error.startswith(f"generation raised {type(error).__name__}")
    assert any(one.error for request in requests for one in request.completions)
    again = submit_all(engine)
    finish(engine)
    assert_completions(again, free)


def test_a_request_whose_forward_pass_raises_fails_alone(llama: LanguageModel, free: list[list[Completion]]) -> None:
    engine = Engine({"m": llama}, audit=True)
    assert engine.workers
    requests = submit_all(engine)
    with watched(llama, raises_at(PROMPTS[2][-1])):
        finish(engine)
    for request, group in zip(requests, free, strict=True):
        if PROMPTS[2][-1] not in request.prompt:
            assert_completions([request], [group])
    assert {one.error for one in requests[2].completions} == {
        f"a forward pass of llama raised ValueError: token {PROMPTS[2][-1]} is poison"
    }


def test_no_model_waits_forever_while_requests_keep_arriving(llama: LanguageModel, target: LanguageModel) -> None:
    engine = Engine({"policy": llama, "target": target}, max_batch=2, audit=True)
    one = SamplingParams(max_tokens=5)
    for _ in range(4):
        engine.submit("policy", TEMPLATE, one)
    request = engine.submit("target", TEMPLATE, one)
    for _ in range(40):
        engine.submit("policy", TEMPLATE, one)  # twice as many as can be computed
        engine.step()
    assert request.finished


def test_models_on_several_devices_take_turns_by_arrival(
    llama: LanguageModel, target: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To PyTorch, ``cpu`` and ``cpu:0`` are two devices with the same memory."""
    settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
    expected = Engine({"policy": llama, "target": target}).run_chains(PROMPTS, **settings)
    devices = {id(llama): torch.device("cpu"), id(target): torch.device("cpu", 0)}
    monkeypatch.setattr(LanguageModel, "device", property(lambda self: devices[id(self)]))
    engine = Engine({"policy": llama, "target": target}, audit=True)
    first = engine.submit("target", TEMPLATE, LONG)
    assert_same_chains(engine.run_chains(PROMPTS, **settings), expected)
    assert len(engine.pools) == 2
    assert engine.step() == [first]
    for _ in range(3):
        engine.submit("policy", TEMPLATE, LONG)
    last = engine.submit("target", TEMPLATE, SamplingParams(max_tokens=1))
    assert finish(engine)[-1] is last
    engine.release()
    assert [pool.arena_bytes for pool in engine.pools.values()] == [0, 0]
