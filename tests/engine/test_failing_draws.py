"""An error between forward passes (sampling, stop texts, target prompts) fails only the sequence that caused it."""

from __future__ import annotations

from typing import Any

import pytest
from checks import assert_nothing_is_held, assert_same
from faults import PARAMS, PROMPTS, RESPOND, SEEDS, probed, to_target
from tiny_models import tiny_adapted
from torch import Tensor

from alignpro.engine import Completion, Engine, SamplingParams, TokenPrompt, derive_seed, runner
from alignpro.models.language_model import LanguageModel


@pytest.mark.parametrize("params", [PARAMS, SamplingParams(max_tokens=14, n=3, stop_token_ids=(0, 1), top_p=0.9)])
def test_an_error_in_sampling_fails_only_its_sequence(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    free = Engine({"m": llama}).generate("m", PROMPTS, params, SEEDS)
    bad = [derive_seed(derive_seed(SEEDS[i], k), t) for i, k, t in ((0, 1, 0), (3, 2, 4), (5, 0, 4))]
    hit = [(i, k) for i, k, t in ((0, 1, 0), (3, 2, 4), (5, 0, 4)) if len(free[i][k].tokens) > t]
    sample = runner.sample

    def broken(hidden: Tensor, head: Any, how: SamplingParams, seeds: Tensor) -> tuple[Tensor, Tensor]:
        if not set(bad).isdisjoint(seeds.tolist()):
            raise ZeroDivisionError("no luck")
        return sample(hidden, head, how, seeds)

    monkeypatch.setattr(runner, "sample", broken)
    engine = probed({"m": llama})
    groups = engine.generate("m", PROMPTS, params, SEEDS)
    assert len(hit) > 1
    for i, (group, others) in enumerate(zip(groups, free, strict=True)):
        for k, (one, other) in enumerate(zip(group, others, strict=True)):
            if (i, k) in hit:
                assert one.error == "the draw of a token raised ZeroDivisionError: no luck"
            else:
                assert_same(one, other)
    assert_nothing_is_held(engine)


def test_sequences_that_have_drawn_before_an_error_do_not_draw_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages draw after the same forward pass, each with its own parameters."""
    policy = tiny_adapted(size=0.1).requires_grad_(False)
    models = {"policy": policy, "target": policy.without_adapter()}
    inputs = [[*prompt, *policy.invocation] for prompt in PROMPTS]
    settings: Any = {"rewrite": PARAMS, "to_target": to_target, "respond": RESPOND, "seeds": SEEDS}
    free = Engine(models).run_chains(inputs, **settings)
    of_responses = {
        derive_seed(derive_seed(derive_seed(seed, "respond", k), m), t)
        for seed in SEEDS
        for k in range(PARAMS.n)
        for m in range(RESPOND.n)
        for t in range(2, 5)
    }
    sample = runner.sample

    def broken(hidden: Tensor, head: Any, how: SamplingParams, seeds: Tensor) -> tuple[Tensor, Tensor]:
        if not of_responses.isdisjoint(seeds.tolist()):
            raise ZeroDivisionError("no luck")
        return sample(hidden, head, how, seeds)

    monkeypatch.setattr(runner, "sample", broken)
    engine = probed(models, max_batch=6)
    chains = engine.run_chains(inputs, **settings)
    assert_nothing_is_held(engine)
    for group, others in zip(chains, free, strict=True):
        for chain, other in zip(group, others, strict=True):
            assert_same(chain.sample, other.sample)
            for y, expected in zip(chain.responses, other.responses, strict=True):
                assert (y.finish_reason == "error") == (len(expected.tokens) > 2)


def test_an_error_in_decoding_fails_only_its_sequence(
    llama: LanguageModel, free: list[list[Completion]], drawn_by_some: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = llama.tokenizer.decode

    def broken(tokens: list[int], **options: Any) -> Any:
        if drawn_by_some in tokens:
            raise UnicodeError("no such character")
        return decode(tokens, **options)

    monkeypatch.setattr(llama.tokenizer, "decode", broken)
    params = SamplingParams(max_tokens=14, n=3, stop_token_ids=(0, 1), stop=("never in there",))
    engine = probed({"m": llama})
    groups = engine.generate("m", PROMPTS, params, SEEDS)
    failed = 0
    for group, others in zip(groups, free, strict=True):
        for one, other in zip(group, others, strict=True):
            if drawn_by_some in other.tokens:
                failed += 1
                assert one.error == "the search for a stop text raised UnicodeError: no such character"
            else:
                assert_same(one, other)
    assert failed > 0
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("given", [None, ["a"], [1, 2.5]])
def test_a_target_prompt_that_is_not_a_list_of_tokens_fails_its_chain_alone(llama: LanguageModel, given: Any) -> None:
    engine = Engine({"policy": llama, "target": llama}, audit=True)
    settings: Any = {"rewrite": PARAMS, "respond": RESPOND, "seeds": SEEDS[:2]}
    first, second = engine.run_chains(PROMPTS[:2], to_target=lambda i, s: TokenPrompt(given if i else [1]), **settings)
    assert [y.error for chain in first for y in chain.responses] == [None] * 6
    for chain in second:
        assert chain.sample.error is None
        assert all("to target: to_target raised TypeError" in (y.error or "") for y in chain.responses)
    assert_nothing_is_held(engine)
