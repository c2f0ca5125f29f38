"""An error in a forward pass fails only the sequence that caused it: the others are unaffected, and no page leaks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from checks import PAGE, assert_nothing_is_held
from faults import PARAMS, PROMPTS, RESPOND, SEEDS, TEMPLATE, assert_failed_alone, probed, raises_at, to_target, watched
from tiny_models import tiny_adapted
from torch import Tensor

from alignpro.engine import Chain, Completion, Engine, SamplingParams, TokenPrompt
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel

SETTINGS: list[dict[str, Any]] = [
    {},
    {"token_budget": 7, "page_tokens": 3},
    {"max_batch": 4},
    {"pool_bytes": 6 * PAGE},
    {"cuda_graphs": "padded"},
    {"async_scheduling": True},
]


@pytest.mark.parametrize(
    "options", SETTINGS, ids=["plain", "in pieces", "few at once", "preempted", "fixed shapes", "ahead"]
)
@pytest.mark.parametrize("where", ["own prompt", "shared prompt", "drawn"])
def test_an_error_in_a_forward_pass_fails_only_the_sequences_with_its_token(
    llama: LanguageModel, free: list[list[Completion]], drawn_by_some: int, options: dict[str, Any], where: str
) -> None:
    bad = {"own prompt": PROMPTS[2][-1], "shared prompt": TEMPLATE[-1], "drawn": drawn_by_some}[where]
    engine = probed({"m": llama}, **options)
    with watched(llama, raises_at(bad)):
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    failed = assert_failed_alone(groups, free, PROMPTS, [bad])
    assert failed == 18 if where == "shared prompt" else 0 < failed < 18
    assert_nothing_is_held(engine)
    assert engine.stats.preemptions > 0 or "pool_bytes" not in options or where != "drawn"
    # The cached keys and values are complete.
    again = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert assert_failed_alone(again, free, PROMPTS, [-5]) == 0


@pytest.mark.parametrize("max_batch", [3, 256])
@pytest.mark.parametrize("stage", ["policy", "target"])
def test_a_chain_whose_forward_pass_raises_fails_alone(
    llama: LanguageModel, target: LanguageModel, stage: str, max_batch: int
) -> None:
    models = {"policy": llama, "target": target}
    settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
    free = Engine(models).run_chains(PROMPTS, **settings)
    flat = [chain for group in free for chain in group]
    drawn = [c.sample for c in flat] if stage == "policy" else [y for c in flat for y in c.responses]
    bad = next(token for one in drawn for token in one.tokens[2:5] if token not in (*TEMPLATE, 2))
    engine = probed(models, max_batch=max_batch)
    with watched(models[stage], raises_at(bad)):
        chains = engine.run_chains(PROMPTS, **settings)
    failed = assert_chains_failed_alone(chains, free, [bad] if stage == "policy" else [], [bad], stage)
    assert 0 < failed < len(drawn)
    assert_nothing_is_held(engine)
    assert assert_chains_failed_alone(engine.run_chains(PROMPTS, **settings), free, [], [], stage) == 0


def assert_chains_failed_alone(
    chains: list[list[Chain]], free: list[list[Chain]], bad: list[int], respond_bad: list[int], stage: str
) -> int:
    """Check both stages as `assert_failed_alone` does. All responses to a failed rewrite fail."""
    failed = 0
    for group, others, prompt in zip(chains, free, PROMPTS, strict=True):
        for chain, other in zip(group, others, strict=True):
            samples = [[chain.sample]], [[other.sample]]
            if assert_failed_alone(*samples, [prompt], bad):
                failed += 1
                reason = f"there is no sample to respond to: {chain.sample.error}"
                assert [(y.finish_reason, y.error) for y in chain.responses] == [("error", reason)] * RESPOND.n
                continue
            responses = [chain.responses], [other.responses]
            failed += assert_failed_alone(*responses, [other.target_tokens], respond_bad if stage == "target" else [])
    return failed


def test_an_error_in_one_stage_of_a_joint_forward_pass_fails_only_that_stage() -> None:
    """Prompter and target share one model and one forward pass."""
    policy = tiny_adapted(size=0.1).requires_grad_(False)
    inputs = [[*prompt, *policy.invocation] for prompt in PROMPTS]
    settings: Any = {"rewrite": PARAMS, "respond": RESPOND, "seeds": SEEDS}

    bad = next(token for token in range(60, 90) if all(token not in prompt for prompt in inputs))

    def only_targets(i: int, sample: Completion) -> TokenPrompt:
        return TokenPrompt([*PROMPTS[i], bad, *sample.tokens]) if i % 2 else to_target(i, sample)

    models = {"policy": policy, "target": policy.without_adapter()}
    free = Engine(models).run_chains(inputs, to_target=only_targets, **settings)
    engine = probed(models, max_batch=6)
    with watched(policy, raises_at(bad)):
        chains = engine.run_chains(inputs, to_target=only_targets, **settings)
    assert_nothing_is_held(engine)
    for i, (group, others) in enumerate(zip(chains, free, strict=True)):
        for chain, other in zip(group, others, strict=True):
            if assert_failed_alone([[chain.sample]], [[other.sample]], [inputs[i]], [bad]):
                continue
            assert_failed_alone([chain.responses], [other.responses], [other.target_tokens], [bad])
            assert i % 2 == 0 or {y.finish_reason for y in chain.responses} == {"error"}


def test_an_error_that_does_not_recur_fails_no_sequence(
    llama: LanguageModel, free: list[list[Completion]], caplog: pytest.LogCaptureFixture
) -> None:
    passes = iter(range(1000))

    def check(_: Tensor) -> None:
        if next(passes) in (0, 5, 6, 20):
            raise OSError("a hiccup")

    engine = probed({"m": llama})
    with watched(llama, check):
        ((alone,),) = engine.generate("m", [[9]], SamplingParams(max_tokens=1))  # a batch of one cannot be split
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert assert_failed_alone(groups, free, PROMPTS, []) == 0
    assert alone.error == "a forward pass of llama raised OSError: a hiccup"
    assert "OSError: a hiccup" in caplog.text  # with the traceback
    assert_nothing_is_held(engine)


def test_if_every_pass_raises_all_sequences_fail_and_the_engine_stays_usable(
    llama: LanguageModel, free: list[list[Completion]]
) -> None:
    engine = probed({"m": llama}, max_batch=5)
    with watched(llama, raises_at(*range(llama.vocabulary))):
        groups = engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert {one.finish_reason for group in groups for one in group} == {"error"}
    assert_nothing_is_held(engine)
    assert assert_failed_alone(engine.generate("m", PROMPTS, PARAMS, SEEDS), free, PROMPTS, []) == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ModelError("it cannot be captured"),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_unrecoverable_errors_end_the_run(
    llama: LanguageModel, free: list[list[Completion]], error: BaseException
) -> None:
    passes = iter(range(1000))

    def check(_: Tensor) -> None:
        if next(passes) == 7:
            raise error

    engine = probed({"m": llama})
    with watched(llama, check), pytest.raises(type(error)):
        engine.generate("m", PROMPTS, PARAMS, SEEDS)
    assert next(passes) == 8
    assert_nothing_is_held(engine)
    assert assert_failed_alone(engine.generate("m", PROMPTS, PARAMS, SEEDS), free, PROMPTS, []) == 0


def test_the_log_names_the_reason(llama: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    engine = probed({"m": llama})
    with watched(llama, raises_at(PROMPTS[2][-1])), caplog.at_level(logging.ERROR):
        engine.generate("m", PROMPTS, PARAMS, SEEDS)
    first, *others = caplog.records
    assert first.exc_info is not None and "a forward pass of llama raised" in first.message
    assert others and all("sequences have failed: a forward pass of llama raised" in r.message for r in others)
