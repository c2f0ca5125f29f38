"""A request can be cancelled in any state: its pages are freed, and the others sample what they would have sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checks import PAGE, assert_completions, assert_nothing_is_held, assert_same, assert_same_chains, finish
from faults import PARAMS, PROMPTS, RESPOND, SEEDS, submit_all, to_target
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_adapted

from alignpro.engine import Completion, Engine, Request, SamplingParams, TokenPrompt
from alignpro.models.language_model import LanguageModel

LONG = SamplingParams(max_tokens=40, n=2)


def assert_cancelled(request: Request, expected: list[Completion]) -> None:
    """Check that each completion is whole, or a beginning of what it would have been."""
    assert request.finished
    for one, other in zip(request.completions, expected, strict=True):
        if one.finish_reason == "cancelled":
            assert one.error is None
            assert one.tokens == other.tokens[: len(one.tokens)] and len(one.logprobs) == len(one.tokens)
        else:
            assert_same(one, other)


def is_queued(request: Request) -> bool:
    return all(one.output is None and not one.output_ids and one.completion is None for one in request.sequences)


def is_prefilling(request: Request) -> bool:
    first = request.sequences[0]
    return first.node is not None and 0 < first.node.computed < len(first.node.tokens) and not first.output_ids


def is_decoding(request: Request) -> bool:
    return any(one.output is not None and len(one.output_ids) > 1 for one in request.sequences)


def is_preempted(request: Request) -> bool:
    return any(one.num_preemptions and one.output is None and one.completion is None for one in request.sequences)


@pytest.mark.parametrize(
    ("state", "options"),
    [
        (is_queued, {"max_batch": 2}),
        (is_prefilling, {"token_budget": 5}),
        (is_decoding, {}),
        (is_decoding, {"cuda_graphs": "padded"}),
        (is_decoding, {"async_scheduling": True}),
        (is_preempted, {"pool_bytes": 6 * PAGE}),
    ],
)
def test_a_request_can_be_cancelled_in_any_state(
    llama: LanguageModel,
    free: list[list[Completion]],
    state: Callable[[Request], bool],
    options: dict[str, Any],
) -> None:
    """All prompts begin with one template, so the pages of the cancelled one are shared with the others."""
    engine = Engine({"m": llama}, audit=True, **options)
    requests = submit_all(engine)
    while not (found := [i for i, request in enumerate(requests) if state(request)]):
        assert engine.num_unfinished_requests > 0
        engine.step()
    i = found[-1]
    engine.cancel(requests[i])
    assert_cancelled(requests[i], free[i])
    engine.cancel(requests[i])  # again
    finished = finish(engine)
    assert requests[i] not in finished
    others = [j for j in range(len(PROMPTS)) if j != i and requests[j] in finished]
    assert_completions([requests[j] for j in others], [free[j] for j in others])
    again = engine.submit("m", PROMPTS[i], PARAMS, SEEDS[i])  # what was computed before it was cancelled is valid
    assert finish(engine) == [again]
    assert_completions([again], [free[i]])


def test_requests_of_one_prompt_are_cancelled_apart(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, audit=True)
    one, other = (engine.submit("m", PROMPTS[0], LONG, seed) for seed in (3, 4))
    for _ in range(5):
        engine.step()
    engine.cancel(one)
    assert [len(each.tokens) for each in one.completions] == [5, 5]
    assert finish(engine) == [other]
    assert engine.stats.computed["prefill"] == len(PROMPTS[0])
    assert engine.stats.sequences == 4 and engine.stats.sampled_tokens == 2 * 5 + 2 * 40
    expected = Engine({"m": llama}).generate("m", [PROMPTS[0]] * 2, LONG, [3, 4])
    assert_cancelled(one, expected[0])
    assert_completions([other], expected[1:])


def test_cancelling_the_last_request_frees_everything(llama: LanguageModel) -> None:
    engine = Engine({"m": llama}, audit=True)
    request = engine.submit("m", PROMPTS[0], LONG)
    engine.step()
    engine.cancel(request)
    assert engine.num_unfinished_requests == 0 and engine.step() == []
    assert_nothing_is_held(engine)
    assert engine.stats.sequences == 2 and engine.stats.floor_tokens == len(PROMPTS[0])
    engine.weights_updated("m")
    engine.release()
    assert engine.pools[llama.device].arena_bytes == 0


def test_the_responses_of_a_chain_can_be_cancelled_while_they_are_queued(
    llama: LanguageModel, target: LanguageModel, free: list[list[Completion]]
) -> None:
    engine = Engine({"policy": llama, "target": target}, max_batch=4, audit=True)
    rewrites = submit_all(engine, "policy")
    responses: list[Request] = []
    cancelled = None
    while engine.num_unfinished_requests:
        for request in engine.step():
            if request in rewrites:  # its rewrites become target requests at once
                samples = [to_target(0, sample).tokens for sample in request.completions]
                responses += [engine.submit("target", tokens, RESPOND, k) for k, tokens in enumerate(samples)]
        if cancelled is None and (queued := [request for request in responses if is_queued(request)]):
            cancelled = queued[-1]
            engine.cancel(cancelled)
    assert_nothing_is_held(engine)
    assert_completions(rewrites, free)
    assert cancelled is not None and {one.tokens == [] for one in cancelled.completions} == {True}
    alone = Engine({"target": target})
    assert len(responses) == len(PROMPTS) * PARAMS.n
    for j, request in enumerate(responses):
        if request is not cancelled:
            assert_completions([request], alone.generate("target", [request.prompt], RESPOND, [j % PARAMS.n]))


def test_a_request_can_be_cancelled_while_chains_run(llama: LanguageModel, target: LanguageModel) -> None:
    settings: Any = {"rewrite": PARAMS, "respond": RESPOND, "seeds": SEEDS}
    models = {"policy": llama, "target": target}
    expected = Engine(models).run_chains(PROMPTS, to_target=to_target, **settings)
    engine = Engine(models, audit=True)
    request = engine.submit("target", PROMPTS[0], LONG)

    def cancelling(i: int, sample: Completion) -> TokenPrompt:
        engine.cancel(request)
        return to_target(i, sample)

    chains = engine.run_chains(PROMPTS, to_target=cancelling, **settings)
    assert_same_chains(chains, expected)
    assert {one.finish_reason for one in request.completions} == {"cancelled"}
    assert engine.num_unfinished_requests == 0
    assert_nothing_is_held(engine)


def test_both_models_of_a_shared_forward_pass_can_be_cancelled() -> None:
    policy = tiny_adapted(size=0.1).requires_grad_(False)
    models = {"policy": policy, "target": policy.without_adapter()}
    inputs = {"policy": [*PROMPTS[0], *policy.invocation], "target": PROMPTS[0]}
    expected = {name: Engine(models).generate(name, [tokens], LONG, [5])[0] for name, tokens in inputs.items()}
    for gone, stays in (("policy", "target"), ("target", "policy")):
        engine = Engine(models, audit=True)
        requests = {name: engine.submit(name, tokens, LONG, 5) for name, tokens in inputs.items()}
        for _ in range(4):
            engine.step()
        engine.cancel(requests[gone])
        assert_cancelled(requests[gone], expected[gone])
        assert finish(engine) == [requests[stays]]
        assert_completions([requests[stays]], [expected[stays]])


@given(
    pages=st.integers(8, 24),
    page_tokens=st.sampled_from([4, 16]),
    budget=st.sampled_from([3, 20, 4096]),
    max_batch=st.integers(1, 9),
    shapes=st.sampled_from([None, "padded"]),
    ahead=st.booleans(),
    actions=st.lists(
        st.tuples(st.sampled_from(["submit", "submit", "cancel", "update"]), st.integers(0, 5), st.integers(0, 7)),
        min_size=1,
        max_size=25,
    ),
)
@settings(max_examples=15)
def test_random_requests_and_cancellations(
    llama: LanguageModel,
    free: list[list[Completion]],
    pages: int,
    page_tokens: int,
    budget: int,
    max_batch: int,
    shapes: Any,
    ahead: bool,
    actions: list[tuple[str, int, int]],
) -> None:
    """The engine audits its pages after every step and every cancellation."""
    engine = Engine(
        {"m": llama},
        pool_bytes=pages * PAGE,
        page_tokens=page_tokens,
        token_budget=budget,
        max_batch=max_batch,
        cuda_graphs=shapes,
        async_scheduling=ahead,
        audit=True,
    )
    requests: list[tuple[int, Request]] = []
    finished: list[Request] = []
    for action, which, steps in actions:
        if action == "submit":
            requests.append((which, engine.submit("m", PROMPTS[which], PARAMS, SEEDS[which])))
        elif action == "cancel" and which < len(requests):
            engine.cancel(requests[which][1])
        elif action == "update" and not engine.num_unfinished_requests:
            engine.weights_updated("m")
        for _ in range(steps):
            finished += engine.step()
    finished += finish(engine)
    assert len(set(finished)) == len(finished)
    for i, request in requests:
        if request in finished:
            assert_completions([request], [free[i]])
        else:
            assert_cancelled(request, free[i])
