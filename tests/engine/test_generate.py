"""Generated tokens, compared with Hugging Face `generate`, a full forward pass and the exact distribution."""

from __future__ import annotations

import pytest
import torch
from checks import assert_same_chains, assert_same_groups
from scipy.stats import chisquare
from tiny_models import ragged, tiny_language_model

from alignpro.engine import Chain, Completion, Engine, SamplingParams, TokenPrompt, derive_seed
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy

PROMPTS = ragged(9, 100, longest=20)


def _stops(model: LanguageModel) -> tuple[int, ...]:
    """Return a fifth of the vocabulary as stop tokens, so that sequences end often."""
    return tuple(range(0, model.vocabulary, 5))


def _draw(model: LanguageModel, prompts: list[list[int]], max_batch: int = 256, **settings) -> list[list[Completion]]:
    return Engine({"m": model}, max_batch=max_batch).generate("m", prompts, SamplingParams(**settings))


def _tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens for completion in group] for group in groups]


def _largest_difference(model: LanguageModel, groups: list[list[Completion]], temperature: float) -> float:
    """Return the largest difference between the engine's log-probabilities and those of a padded forward pass."""
    completions = [completion for group in groups for completion in group]
    prompts = [prompt for prompt, group in zip(PROMPTS, groups, strict=True) for _ in group]
    batch = SequenceBatch.build(prompts, [completion.tokens for completion in completions])
    values = Policy(model, model, temperature=temperature).token_stats(batch).logprob
    drawn = torch.tensor(
        [logprob for completion in completions for logprob in completion.logprobs], dtype=torch.float64
    )
    return (values[batch.mask].double() - drawn).abs().max().item()


def test_greedy_tokens_equal_those_of_generate(any_model: LanguageModel) -> None:
    stops = _stops(any_model)
    groups = _draw(any_model, PROMPTS, max_tokens=24, temperature=0.0, stop_token_ids=stops)
    width = max(map(len, PROMPTS))
    expected = any_model.causal.generate(
        input_ids=torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )[:, width:].tolist()
    for (completion,), tokens in zip(groups, expected, strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
        assert completion.tokens == tokens[:end]
        assert completion.logprobs == [0.0] * end  # certain
    assert len({len(completion.tokens) for (completion,) in groups}) > 3  # rows left the batch at different times


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_those_of_a_forward_pass(any_model: LanguageModel, temperature: float) -> None:
    groups = _draw(any_model, PROMPTS, max_tokens=24, n=3, temperature=temperature, stop_token_ids=_stops(any_model))
    assert _largest_difference(any_model, groups, temperature) < 1e-5 / temperature


def test_logprobs_of_a_model_in_bfloat16_are_near_those_of_a_forward_pass() -> None:
    model = tiny_language_model("llama", dtype=torch.bfloat16)
    groups = _draw(model, PROMPTS, max_tokens=24, n=3)
    assert _largest_difference(model, groups, 1.0) < 0.1


def test_float64_is_exact_to_rounding() -> None:
    model = tiny_language_model("gpt2", dtype=torch.float64)
    groups = _draw(model, PROMPTS, max_tokens=24, n=3, stop_token_ids=_stops(model))
    assert _largest_difference(model, groups, 1.0) < 1e-12


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}], ids=["whole", "filtered"])
def test_tokens_do_not_depend_on_the_batch(any_model: LanguageModel, filters: dict[str, float]) -> None:
    params = {"max_tokens": 16, "n": 3, "stop_token_ids": _stops(any_model), **filters}
    engine = Engine({"m": any_model})
    seeds = [derive_seed(7, i) for i in range(len(PROMPTS))]
    together = _tokens(engine.generate("m", PROMPTS, SamplingParams(**params), seeds))
    for max_batch in (2, 7):
        small = Engine({"m": any_model}, max_batch=max_batch)
        assert _tokens(small.generate("m", PROMPTS, SamplingParams(**params), seeds)) == together
    backwards = engine.generate("m", PROMPTS[::-1], SamplingParams(**params), seeds[::-1])
    assert _tokens(backwards)[::-1] == together
    alone = engine.generate("m", PROMPTS[4:5], SamplingParams(**params), seeds[4:5])
    assert _tokens(alone) == together[4:5]


def test_a_shorter_limit_draws_the_same_beginning(llama: LanguageModel) -> None:
    long, short = _draw(llama, PROMPTS, max_tokens=20, n=2), _draw(llama, PROMPTS, max_tokens=5, n=2)
    assert [[c.tokens[:5] for c in group] for group in long] == _tokens(short)


def test_more_samples_of_a_prompt_begin_with_the_fewer(llama: LanguageModel) -> None:
    many, few = _draw(llama, PROMPTS, max_tokens=6, n=5), _draw(llama, PROMPTS, max_tokens=6, n=2)
    for first, second in zip(many, few, strict=True):
        assert_same_groups([first[:2]], [second], 1e-5)


def test_samples_of_a_prompt_differ_and_a_seed_repeats_them(llama: LanguageModel) -> None:
    (group,) = _draw(llama, PROMPTS[:1], max_tokens=12, n=8, seed=1)
    assert len({tuple(completion.tokens) for completion in group}) == 8
    assert _draw(llama, PROMPTS[:1], max_tokens=12, n=8, seed=1) == [group]
    assert _draw(llama, PROMPTS[:1], max_tokens=12, n=8, seed=2) != [group]


def test_equal_prompts_draw_their_own_samples_from_one_prefill(llama: LanguageModel) -> None:
    engine = Engine({"m": llama})
    first, second = engine.generate("m", [PROMPTS[3], PROMPTS[3]], SamplingParams(max_tokens=12, n=2))
    assert len({tuple(completion.tokens) for completion in first + second}) == 4
    assert engine.stats.computed == {"prefill": len(PROMPTS[3]), "decode": 44}
    assert engine.stats.sampled_tokens == 48


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_follow_the_softmax(llama: LanguageModel, temperature: float) -> None:
    count = 4000
    (group,) = _draw(llama, [PROMPTS[0]], max_batch=count, max_tokens=1, n=count, temperature=temperature)
    drawn = torch.tensor([completion.tokens[0] for completion in group]).bincount(minlength=llama.vocabulary)
    logits = llama.causal(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = count * (logits / temperature).softmax(-1)
    common = expected > 10
    observed = [*drawn[common].tolist(), drawn[~common].sum().item()]
    assert chisquare(observed, [*expected[common].tolist(), expected[~common].sum().item()]).pvalue > 1e-3


def test_the_stop_token_is_kept_and_ends_the_sequence(llama: LanguageModel) -> None:
    stops = _stops(llama)
    completions = [c for group in _draw(llama, PROMPTS, max_tokens=8, n=8, stop_token_ids=stops) for c in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert len(completion.logprobs) == len(completion.tokens)
        assert not set(completion.tokens[:-1]) & set(stops)
        if completion.finish_reason == "stop":
            assert completion.tokens[-1] in stops
            assert completion.text_tokens == completion.tokens[:-1]
        else:
            assert len(completion.tokens) == 8
            assert completion.tokens[-1] not in stops
            assert completion.text_tokens == completion.tokens


def test_a_stop_token_at_the_limit_is_a_stop(llama: LanguageModel) -> None:
    everything = tuple(range(llama.vocabulary))
    ((completion,),) = _draw(llama, PROMPTS[:1], max_tokens=1, stop_token_ids=everything)
    assert completion.finish_reason == "stop"


def test_no_stop_token_means_the_whole_length(llama: LanguageModel) -> None:
    assert {len(c.tokens) for group in _draw(llama, PROMPTS, max_tokens=9, n=2) for c in group} == {9}


def test_no_prompts_give_no_completions(llama: LanguageModel) -> None:
    assert _draw(llama, []) == []


def test_a_request_that_cannot_run_fails_alone(llama: LanguageModel) -> None:
    params = {"max_tokens": 8, "n": 2}
    seeds = [derive_seed(3, i) for i in range(6)]
    good = [PROMPTS[0], PROMPTS[1]]
    bad = [[], [1] * (llama.context_length - 7), [1, llama.vocabulary], [-1]]
    engine = Engine({"m": llama})
    mixed = engine.generate("m", [bad[0], good[0], bad[1], bad[2], good[1], bad[3]], SamplingParams(**params), seeds)
    first, second = engine.generate("m", good, SamplingParams(**params), [seeds[1], seeds[4]])
    assert_same_groups([mixed[1] + mixed[4]], [first + second], 1e-5)
    for i, message in (
        (0, "is empty"),
        (2, "do not fit in the context"),
        (3, "not in the vocabulary"),
        (5, "token -1"),
    ):
        assert len(mixed[i]) == 2
        for completion in mixed[i]:
            assert completion.finish_reason == "error"
            assert message in (completion.error or "")
            assert completion.tokens == []


def test_a_prompt_that_just_fits_fills_the_context(any_model: LanguageModel) -> None:
    ((completion,),) = _draw(any_model, [[1] * (any_model.context_length - 8)], max_tokens=8)
    assert completion.error is None
    assert len(completion.tokens) == 8


class TestChains:
    """Chains x → x' → y."""

    REWRITE = SamplingParams(max_tokens=6, n=3)
    RESPOND = SamplingParams(max_tokens=5, n=2)

    @staticmethod
    def to_target(i: int, sample: Completion) -> TokenPrompt:
        return TokenPrompt([1, *sample.tokens, 2])

    def run(
        self, prompter: LanguageModel, target: LanguageModel, prompts: list[list[int]], seeds: list[int]
    ) -> list[list[Chain]]:
        engine = Engine({"policy": prompter, "target": target}, max_batch=8)
        return engine.run_chains(
            prompts, rewrite=self.REWRITE, to_target=self.to_target, respond=self.RESPOND, seeds=seeds
        )

    @pytest.fixture(scope="class")
    def target(self) -> LanguageModel:
        return tiny_language_model("qwen2", seed=1)

    def test_each_stage_draws_with_its_own_seeds(self, llama: LanguageModel, target: LanguageModel) -> None:
        seeds = [11, 12, 13, 14]
        chains = self.run(llama, target, PROMPTS[:4], seeds)
        engine = Engine({"policy": llama, "target": target})
        rewrites = engine.generate("policy", PROMPTS[:4], self.REWRITE, seeds)
        for i, group in enumerate(chains):
            assert_same_groups([[chain.sample for chain in group]], [rewrites[i]], 1e-5)
            for k, chain in enumerate(group):
                assert chain.target_tokens == self.to_target(i, chain.sample).tokens
                seed = derive_seed(seeds[i], "respond", k)
                (expected,) = engine.generate("target", [chain.target_tokens], self.RESPOND, [seed])
                assert_same_groups([chain.responses], [expected], 1e-5)

    def test_a_chain_depends_only_on_its_prompt_and_seed(self, llama: LanguageModel, target: LanguageModel) -> None:
        seeds = [11, 12, 13, 14]
        together = self.run(llama, target, PROMPTS[:4], seeds)
        alone = self.run(llama, target, PROMPTS[2:3], seeds[2:3])
        assert_same_chains(alone, together[2:3], 1e-5)

    def test_responses_to_equal_rewrites_differ(self, llama: LanguageModel, target: LanguageModel) -> None:
        engine = Engine({"policy": llama, "target": target})
        greedy = SamplingParams(max_tokens=6, n=3, temperature=0.0)
        (group,) = engine.run_chains(PROMPTS[:1], rewrite=greedy, to_target=self.to_target, respond=self.RESPOND)
        assert group[0].sample == group[1].sample == group[2].sample
        assert len({tuple(y.tokens) for chain in group for y in chain.responses}) == 6

    def test_responses_of_a_prompt_that_cannot_run_name_its_error(
        self, llama: LanguageModel, target: LanguageModel
    ) -> None:
        seeds = [11, 12, 13]
        chains = self.run(llama, target, [PROMPTS[0], [], PROMPTS[1]], seeds)
        for chain in chains[1]:
            assert (chain.sample.finish_reason, chain.sample.error) == ("error", "the prompt is empty")
            reason = "there is no sample to respond to: the prompt is empty"
            assert [(y.finish_reason, y.error) for y in chain.responses] == [("error", reason)] * 2
        assert_same_chains([chains[0], chains[2]], self.run(llama, target, PROMPTS[:2], [11, 13]), 1e-5)

    def test_a_rewrite_that_does_not_fit_the_target_is_an_error_of_its_responses(
        self, llama: LanguageModel, target: LanguageModel
    ) -> None:
        inputs = iter([[1] * 200, [1, 2], [1, 2]])
        engine = Engine({"policy": llama, "target": target})
        ((first, second, _),) = engine.run_chains(
            PROMPTS[:1],
            rewrite=self.REWRITE,
            to_target=lambda i, sample: TokenPrompt(next(inputs)),
            respond=self.RESPOND,
        )
        assert [y.finish_reason for y in first.responses] == ["error", "error"]
        assert [y.error for y in second.responses] == [None, None]
