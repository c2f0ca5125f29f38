"""LoRAs inside the decoder that runs in one call: equal to peft's layers, with the current weights, on the active tokens."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import ACTIVATED, FULL, LORA, logits_by_peft, perturb, tiny_adapted, tiny_language_model, tokenizer
from torch import Tensor, nn

from alignpro.engine import Engine, SamplingParams
from alignpro.models.adapters import add_adapter
from alignpro.models.attention_interface import AttentionSettings
from alignpro.models.cpu import fused_decoder
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention
from alignpro.models.sequences import SequenceBatch
from alignpro_kernels import PagedKeys, backends

pytestmark = pytest.mark.skipif("no C++ compiler found" in (backends()["cpp"] or ""), reason="no C++ compiler")

FUSED = ("llama", "qwen2", "qwen3", "mistral")
TOKENS = 13  # longer than the sliding windows of the tiny models


class Separate:
    """Paged attention that the fused decoder does not recognise, so that each layer calls it."""

    def __init__(self, *arguments: Any) -> None:
        self._attention = PagedAttention(*arguments)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        return self._attention.attend(layer, query, key, value, settings)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each pass that runs as one call."""
    run, found = fused_decoder.decoder_stack, list[int]()

    def counted(hidden: Tensor, *arguments: Any) -> Tensor:
        found.append(len(hidden))
        return run(hidden, *arguments)

    monkeypatch.setattr(fused_decoder, "decoder_stack", counted)
    return found


def states(
    model: LanguageModel, active: Tensor | bool = True, *, sequences: int = 1, kind: Any = PagedAttention
) -> Tensor:
    """Return the states, (sequences · TOKENS, D), of a pass of generation over an empty pool; all sequences are equal."""
    config = model.causal.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 4 * sequences, 2, 4, config.num_key_value_heads, head_dim
    pages = [torch.zeros(size) for _ in range(config.num_hidden_layers)]
    counts = torch.full((sequences,), TOKENS, dtype=torch.int32)
    ends = torch.arange(0, sequences + 1, dtype=torch.int32) * TOKENS
    span = torch.arange(TOKENS).repeat(sequences)
    table = torch.arange(4 * sequences, dtype=torch.int32).view(sequences, 4)
    level = PagedKeys(ends, table, counts, span.int(), torch.zeros(sequences, dtype=torch.int32))
    slots = torch.cat([torch.arange(TOKENS) + 16 * i for i in range(sequences)])
    with torch.no_grad():
        return model.token_states(span + 5, span, kind(pages, slots, [level]), active)


def with_adapter(config: PeftConfig, architecture: str = "llama") -> LanguageModel:
    """Return a model that is loaded with an adapter of random weights."""
    torch.manual_seed(1)
    wrapped = get_peft_model(tiny_language_model(architecture).causal, config)
    return perturb(LanguageModel(wrapped.eval(), tokenizer(architecture), architecture))


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "down_proj"]} | settings)


@pytest.mark.parametrize("architecture", FUSED)
def test_states_equal_those_of_the_layers(architecture: str, passes: list[int]) -> None:
    model = tiny_adapted(architecture)
    base, rows = states(tiny_language_model(architecture)), torch.arange(5, TOKENS)
    passes.clear()
    for active in (True, False, rows, torch.tensor([7, 3]), torch.arange(0)):
        found, expected = states(model, active), states(model, active, kind=Separate)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if isinstance(active, Tensor) and len(active):
            assert torch.equal(found[: active.min()], base[: active.min()])
            assert not torch.allclose(found[active], base[active], atol=1e-2)
        elif active is not True:
            assert torch.equal(found, base)
    assert passes == [TOKENS] * 5


@pytest.mark.parametrize(
    "config",
    [
        lora_config(target_modules="all-linear"),
        lora_config(r=5, use_rslora=True, rank_pattern={"k_proj": 2}, target_modules=["q_proj", "k_proj", "up_proj"]),
        lora_config(target_modules=["gate_proj", "lm_head"]),
        lora_config(lora_dropout=0.3),
    ],
    ids=["all", "ranks", "head", "dropout that is off"],
)
def test_a_model_loaded_with_a_lora_is_fused(config: LoraConfig, passes: list[int]) -> None:
    base = states(tiny_language_model("llama"))
    model = with_adapter(config)
    passes.clear()
    found = states(model)
    with model.disable_adapter():
        assert torch.equal(states(model), base)
    assert passes == [TOKENS] * 2
    torch.testing.assert_close(found, states(model, kind=Separate), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-2)


def test_several_adapters_add_up(passes: list[int]) -> None:
    model = with_adapter(lora_config(target_modules=["q_proj", "v_proj", "o_proj"]))
    assert isinstance(model.model, PeftModel)
    one = states(model)
    model.model.add_adapter("other", lora_config(r=2, lora_alpha=3, init_lora_weights=False))
    passes.clear()
    assert torch.equal(states(model), one)  # it is not active yet
    found = {}
    for active in ("other", ["default", "other"]):
        model.model.base_model.set_adapter(active)
        found[len(active)] = states(model)
        torch.testing.assert_close(found[len(active)], states(model, kind=Separate), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[len(active)], one, atol=1e-3)
    model.model.base_model.set_adapter("default")
    assert torch.equal(states(model), one)
    model.model.delete_adapter("other")
    assert torch.equal(states(model), one)
    assert len(passes) == 5


@pytest.mark.parametrize("counted", [True, False])
def test_a_step_of_training_acts_at_once(counted: bool) -> None:
    """Without notification, even where PyTorch does not count the change, as with fused optimizers."""
    model = tiny_adapted(adapter=LORA)
    before = states(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                (weight if counted else weight.data).mul_(1.5)
    after = states(model)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, states(model, kind=Separate), rtol=1e-4, atol=1e-4)


def test_a_sequence_has_the_same_bits_beside_others() -> None:
    """One set of weights serves two models in the same pass: the base's sequences have the base's bits."""
    model = tiny_adapted()
    alone, base = states(model), states(model, active=False)
    together = states(model, torch.arange(TOKENS, 3 * TOKENS), sequences=4)
    for found, expected in zip(together.split(TOKENS), (base, alone, alone, base), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("adapter", [LORA, ACTIVATED], ids=["plain", "activated"])
def test_samples_are_those_of_peft(adapter: Any, passes: list[int]) -> None:
    """Greedy tokens are those of its `generate`, log-probabilities those of its own forward pass."""
    model = tiny_adapted("qwen2", adapter=adapter)
    prompts = [[*row, *model.invocation] for row in ([7, 9, 30], [12, 40, 8, 5, 6, 11], [33])]
    engine = Engine({"m": model})
    passes.clear()
    greedy, sampled = (
        [each for (each,) in engine.generate("m", prompts, SamplingParams(8, temperature=t))] for t in (0.0, 1.0)
    )
    assert len(passes) >= 8
    for prompt, best in zip(prompts, greedy, strict=True):
        with torch.no_grad():
            found = model.model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
        assert list(best.tokens) == found[0, len(prompt) :].tolist()
    truth = logits_by_peft(model, SequenceBatch.build(prompts, [list(each.tokens) for each in sampled]))
    tokens = torch.tensor([token for each in sampled for token in each.tokens])
    logprobs = torch.tensor([logprob for each in sampled for logprob in each.logprobs])
    chosen = truth.detach().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lora_config(use_dora=True), "a LoRA is of peft's kind DoraLinearVariant"),
        (lora_config(lora_bias=True), "a LoRA has a bias"),
        (lora_config(target_modules=["q_proj", "embed_tokens"]), "embedding or last norm has been replaced"),
        (lora_config(modules_to_save=["input_layernorm"]), "they have other weights, such as an adapter's"),
        (
            IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
            "their self_attn.k_proj is a peft.tuners.ia3.layer.Linear",
        ),
    ],
    ids=["DoRA", "bias", "embedding", "saved norm", "IA3"],
)
def test_other_adapters_run_layer_by_layer(
    config: PeftConfig, reason: str, passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "alignpro.models.cpu.fused_decoder"):
        model = with_adapter(config)
        passes.clear()
        found = [states(model) for _ in range(3)]
    assert passes == []
    assert [reason in record.message for record in caplog.records].count(True) == 1
    assert torch.equal(found[0], states(model, kind=Separate))


def test_dropout_runs_only_in_training_mode(passes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter(lora_config(lora_dropout=0.5))
    expected = states(model)
    passes.clear()
    with caplog.at_level(logging.INFO, "alignpro.models.cpu.fused_decoder"):
        model.model.train()
        assert not torch.equal(states(model), states(model))
    assert passes == [] and caplog.text.count("a LoRA has dropout in training mode") == 1
    model.model.eval()
    assert torch.equal(states(model), expected) and passes == [TOKENS]


def test_merging_and_hooks_are_seen(passes: list[int]) -> None:
    model = tiny_adapted(adapter=LORA)
    expected, called = states(model), list[int]()
    down = next(module for name, module in model.model.named_modules() if name.endswith("lora_A.default"))
    handle = down.register_forward_hook(lambda *_: called.append(1))
    passes.clear()
    torch.testing.assert_close(states(model), expected, rtol=1e-4, atol=1e-4)
    assert called == [1] and passes == []
    handle.remove()
    assert isinstance(model.model, PeftModel)
    again = add_adapter(model, FULL)
    passes.clear()
    found = states(again)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert passes == [TOKENS] and not any(isinstance(m, nn.ModuleDict) for m in again.causal.modules())
