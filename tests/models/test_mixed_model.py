"""Models whose logits are a weighted sum of several models': in scoring, and in generation."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    ACTIVATED,
    INVOCATION,
    LORA,
    LORA_HEAD,
    SOFT,
    apply_head,
    logits_by_peft,
    ragged,
    tiny_adapted,
    tiny_language_model,
    tokenizer,
)
from torch import Tensor

from alignpro.engine import Completion, Engine, SamplingParams
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixed_model import MixedModel, mix_models, share_equal_weights
from alignpro.models.sequences import SequenceBatch
from alignpro_kernels import backends

WEIGHTS = (0.7, 0.5, -0.2)


def three_models() -> list[LanguageModel]:
    """Return models with heads, widths, layers and architectures of their own, over one vocabulary."""
    return [
        tiny_language_model("llama"),
        tiny_language_model("gpt2", seed=1, n_embd=16, n_layer=1),
        tiny_language_model("llama", seed=2, num_hidden_layers=3, num_key_value_heads=4),
    ]


def lora_and_base() -> list[LanguageModel]:
    adapted = tiny_adapted(adapter=LORA)
    return [adapted, adapted.without_adapter()]


def head_lora_and_base() -> list[LanguageModel]:
    adapted = tiny_adapted(adapter=LORA_HEAD)
    return [adapted, adapted.without_adapter()]


MIXTURES = {
    "three models": (three_models, WEIGHTS),
    "a LoRA and its base": (lora_and_base, (0.4, 0.6)),
    "a LoRA on the head and its base, beyond 1": (head_lora_and_base, (1.3, -0.3)),
}


@pytest.fixture(params=MIXTURES, scope="module")
def mixture(request: pytest.FixtureRequest) -> MixedModel:
    make, weights = MIXTURES[request.param]
    return MixedModel(make(), weights, "mixture")


@torch.no_grad()
def logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Return Σ w_k z_k, (L, V), from the forward passes of transformers."""
    if not isinstance(model, MixedModel):
        if not model.is_base:
            return model.logits(torch.tensor([tokens]))[0]
        with model.disable_adapter():
            return model.logits(torch.tensor([tokens]))[0]
    parts = zip(model.weights, model.parts, strict=True)
    return torch.stack([weight * logits(part, tokens) for weight, part in parts]).sum(0)


def test_states_and_head_give_the_weighted_sum_of_logits(mixture: MixedModel) -> None:
    batch = SequenceBatch.build([[5, 17, 3], [5, 17, 3], [88]], [[41, 20], [7], [2, 9, 4]])
    with torch.no_grad():
        found = apply_head(mixture, mixture.action_states(batch))
    expected = torch.cat(
        [
            logits(mixture, [*prompt, *completion])[len(prompt) - 1 : -1]
            for prompt, completion in zip(batch.prompts, batch.completions, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def generated(model: LanguageModel, prompts: list[list[int]], **settings: object) -> list[list[Completion]]:
    engine = {name: settings.pop(name) for name in ("max_batch", "cuda_graphs", "pool_bytes") if name in settings}
    return Engine({"m": model}, audit=True, **engine).generate("m", prompts, SamplingParams(**settings))


def test_logprobs_are_those_of_the_distribution_that_was_sampled(mixture: MixedModel) -> None:
    """Eight samples a prompt: prompts are computed once, for all parts, and sequences leave the batch at different times."""
    prompts, temperature = ragged(3, mixture.vocabulary, longest=20), 0.6
    stops = tuple(range(0, mixture.vocabulary, 5))
    groups = generated(mixture, prompts, max_tokens=8, n=8, temperature=temperature, stop_token_ids=stops)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            rows = logits(mixture, [*prompt, *completion.tokens])[len(prompt) - 1 : -1]
            expected = (rows / temperature).log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])
            assert completion.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)


def test_samples_do_not_depend_on_batching_nor_on_shapes_of_passes(mixture: MixedModel) -> None:
    prompts = ragged(4, mixture.vocabulary, longest=12)
    together = generated(mixture, prompts, max_tokens=6, n=3)
    for other in (
        generated(mixture, prompts, max_tokens=6, n=3, max_batch=2),
        generated(mixture, prompts, max_tokens=6, n=3, cuda_graphs="padded"),
    ):
        assert [[c.tokens for c in group] for group in other] == [[c.tokens for c in group] for group in together]


def test_filters_act_on_the_mixed_distribution(mixture: MixedModel) -> None:
    prompt = [5, 17, 3]
    ((first, *_),) = generated(mixture, [prompt], max_tokens=3, n=4, top_k=1)
    greedy = list(prompt)
    for _ in range(3):
        greedy.append(int(logits(mixture, greedy)[-1].argmax()))
    assert first.tokens == greedy[3:] and first.logprobs == pytest.approx([0.0] * 3)


def test_at_strength_one_and_zero_the_models_themselves_run() -> None:
    one, reference = lora_and_base()
    assert mix_models([one], [1.0], reference, "m") is one
    assert mix_models([one], [0.0], reference, "m") is reference
    three = three_models()
    mixed = mix_models(three[:2], [0.1 + 0.2, 0.7], three[2], "m")  # .1 + .2 is not .3
    assert isinstance(mixed, MixedModel) and len(mixed.parts) == 2


def test_an_activated_lora_acts_from_its_invocation_on_and_shares_what_comes_before() -> None:
    adapted = tiny_adapted(adapter=ACTIVATED)
    mixture = mix_models([adapted], [0.4], adapted.without_adapter(), "dial")
    assert isinstance(mixture, MixedModel) and mixture.invocation == adapted.invocation
    prompt = [5, 17, 3, *tokenizer("llama").encode(INVOCATION, add_special_tokens=False), 20]
    engine = Engine({"policy": mixture, "target": adapted.without_adapter()}, audit=True)
    ((completion,),) = engine.generate("policy", [prompt], SamplingParams(max_tokens=5))
    batch = SequenceBatch.build([prompt], [completion.tokens])
    with torch.no_grad(), adapted.disable_adapter():
        base = logits_by_peft(adapted, batch)
    with torch.no_grad():
        rows = 0.4 * logits_by_peft(adapted, batch) + 0.6 * base
    expected = rows.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])
    assert completion.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    # The base beside it is a model of its own: its pages hold one model's layers, not two.
    params = SamplingParams(max_tokens=5)
    alone = Engine({"target": adapted.without_adapter()}).generate("target", [prompt], params)
    assert engine.generate("target", [prompt], params)[0][0].tokens == alone[0][0].tokens


def test_models_that_cannot_be_mixed_are_named() -> None:
    llama = tiny_language_model("llama")
    for other, message in (
        (tiny_language_model("llama", vocab_size=50), r"mix: llama has vocabulary \d+, llama 50"),
        (tiny_language_model("llama", dtype=torch.float64), r"llama has dtype torch.float32, llama torch.float64"),
        (tiny_language_model("gemma2"), r"gemma2 has final_logit_softcapping=3.0"),
        (tiny_adapted(adapter=SOFT), "llama has a soft prompt"),
    ):
        with pytest.raises(ModelError, match=message):
            mix_models([llama], [0.5], other, "mix")


def test_equal_weights_are_held_once() -> None:
    one, other = tiny_adapted(adapter=LORA), tiny_adapted(adapter=LORA, size=0.3)
    prompts = [[5, 17, 3]]
    before = generated(other, prompts, max_tokens=5)
    base = sum(weight.nbytes for weight in one.without_adapter().causal.parameters() if not weight.requires_grad)
    assert share_equal_weights([one, other]) == base
    assert one.head.shares_storage_with(other.head)
    assert generated(other, prompts, max_tokens=5) == before
    mixture = mix_models([one, other], [0.5, 0.5], one.without_adapter(), "m")
    assert mixture.head.weight.data_ptr() == one.head.weight.data_ptr()  # one pass of one head


def test_weights_that_are_trained_are_not_shared() -> None:
    frozen, trained = tiny_language_model("llama"), tiny_language_model("llama").requires_grad_(True)
    assert share_equal_weights([frozen, trained]) == 0
    trained.causal.model.norm.requires_grad_(False)
    assert share_equal_weights([frozen, trained]) == trained.causal.model.norm.weight.nbytes


@pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")
def test_shared_weights_are_packed_once() -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96}
    one, other = tiny_language_model("llama", **wide), tiny_adapted(adapter=LORA, **wide)
    before = [generated(model, [[5, 17, 3]], max_tokens=5) for model in (one, other)]
    assert share_equal_weights([one, other]) > 0
    assert [generated(model, [[5, 17, 3]], max_tokens=5) for model in (one, other)] == before

    layer, twin = one.causal.model.layers[0].mlp.down_proj, other.causal.model.layers[0].mlp.down_proj.base_layer
    assert twin.packed_weights is not layer.packed_weights
    assert twin.packed_weights.panels(twin) is layer.packed_weights.panels(layer)
    other.weights_updated()
    assert twin.packed_weights.panels(twin) is layer.packed_weights.panels(layer)
    twin.weight.data = 2 * twin.weight.data  # in memory of its own from now on
    doubled = twin.packed_weights.panels(twin).weight
    torch.testing.assert_close(doubled, 2 * layer.packed_weights.panels(layer).weight)
