"""A model written to a GGUF file and read back is the same model with the same tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import SPLITS, TEMPLATE, TEXTS, bpe_tokenizer, save_gguf, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignpro.errors import ModelError
from alignpro.models.gguf.header import read_header
from alignpro.models.gguf.reading import ReadModel
from alignpro.models.gguf.vocabulary import end_token_ids
from alignpro.models.gguf.writing import write_gguf

ROPE = {"rope_theta": 10000.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with a shared table": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with Llama 3's positions": ("llama", {"rope_parameters": LLAMA3}),
    "llama with stretched positions": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3, heads wider than its width": ("qwen3", {"head_dim": 16}),
}


def logprobs(model: Any, texts: tuple[str, ...], tokenizer: Any) -> list[Tensor]:
    """Return the log-probabilities of all tokens after each prefix of each text."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([tokenizer.encode(text)])).logits[0].log_softmax(-1) for text in texts]


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_same_and_its_tokens_are_the_same(name: str, tmp_path: Path) -> None:
    architecture, settings = MODELS[name]
    original = save_gguf(tmp_path / "model.gguf", architecture, **settings)
    ReadModel(read_header(tmp_path / "model.gguf")).save(tmp_path / "back")
    model, tokenizer = (kind.from_pretrained(tmp_path / "back") for kind in (AutoModelForCausalLM, AutoTokenizer))
    given = bpe_tokenizer(SPLITS[architecture])
    for text in TEXTS:
        assert tokenizer.encode(text) == given.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == given.decode(given.encode(text))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == (given.eos_token, given.pad_token)
    assert model.generation_config.eos_token_id == given.eos_token_id
    expected = logprobs(original, TEXTS, given)
    for one, other in zip(logprobs(model, TEXTS, tokenizer), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize(
    ("quantization", "steps"), [("f16", 2048), ("bf16", 256), ("q8_0", 254), ("q4_1", 30), ("q4_0", 14)]
)
def test_quantized_weights_differ_by_their_rounding(quantization: str, steps: int, tmp_path: Path) -> None:
    original = save_gguf(tmp_path / "model.gguf", "qwen2", quantization, intermediate_size=64).state_dict()
    read = ReadModel(read_header(tmp_path / "model.gguf")).model.state_dict()
    different = 0
    for name, weight in original.items():
        if weight.ndim == 1:
            assert torch.equal(read[name], weight)
            continue
        table = 254 if quantization.startswith("q4") and name == "model.embed_tokens.weight" else steps
        # Half a step of the widest range that a block can have: twice the largest absolute value.
        tolerance = 2 * weight.view(-1, 32).abs().amax(1, keepdim=True) / table * (0.6 if table > 30 else 1.1)
        assert ((read[name].view(-1, 32) - weight.view(-1, 32)).abs() <= tolerance).all(), name
        different += int((read[name] != weight).sum())
    assert different


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_split_of_the_text_is_kept(split: str, tmp_path: Path) -> None:
    given = bpe_tokenizer(split)
    write_gguf(tiny_model("llama", split), given, tmp_path / "model.gguf", name="tiny")
    header = read_header(tmp_path / "model.gguf")
    assert header.metadata["tokenizer.ggml.pre"] == split
    back = ReadModel(header).tokenizer
    assert [back.encode(text) for text in TEXTS[:4]] == [given.encode(text) for text in TEXTS[:4]]


def test_digits_that_stand_alone_do_so_after_reading(tmp_path: Path) -> None:
    """transformers' own reader takes SmolLM's split for that of GPT-2, and joins digits."""
    save_gguf(tmp_path / "model.gguf")
    tokenizer = ReadModel(read_header(tmp_path / "model.gguf")).tokenizer
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]


def test_a_second_token_that_ends_a_turn_is_kept(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), bpe_tokenizer()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    write_gguf(model, tokenizer, tmp_path / "model.gguf", name="tiny")
    header = read_header(tmp_path / "model.gguf")
    assert end_token_ids(header) == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ReadModel(header).model.generation_config.eos_token_id == end_token_ids(header)


def test_end_tokens_of_model_and_template_are_kept_and_a_third_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(bpe_tokenizer())  # its template ends turns with <|im_end|>
    text_end, begin, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.eos_token = "<|endoftext|>"
    found = []
    for ends in (text_end, begin):
        model = tiny_model("llama")
        model.generation_config.eos_token_id = ends
        write_gguf(model, tokenizer, tmp_path / "model.gguf", name="tiny")
        found.append(end_token_ids(read_header(tmp_path / "model.gguf")))
    assert found == [[text_end, turn_end]] * 2
    (warning,) = [record.getMessage() for record in caplog.records if "two end tokens" in record.getMessage()]
    assert warning == f"tiny: GGUF has a place for two end tokens; texts will not end at <|im_start|> ({begin})"
    tokenizer.chat_template = None
    write_gguf(model, tokenizer, tmp_path / "model.gguf", name="tiny")
    assert end_token_ids(read_header(tmp_path / "model.gguf")) == [text_end, begin]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(settings: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model tiny: {reason} cannot be written"):
        save_gguf(tmp_path / "model.gguf", **settings)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_f16_cannot_hold_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"output.weight has a value of 1e\+05, too large for f16; take bf16"):
        write_gguf(model, bpe_tokenizer(), tmp_path / "model.gguf", quantization="f16", name="tiny")


def test_an_unknown_scaling_of_positions_is_refused(tmp_path: Path) -> None:
    rope = LLAMA3 | {"low_freq_factor": 2.0}
    save_gguf(tmp_path / "model.gguf", rope_parameters=rope, head_dim=32)
    with pytest.raises(ModelError, match=r"model.gguf: scales rotary positions .* \(tensor rope_freqs.weight\)"):
        ReadModel(read_header(tmp_path / "model.gguf"))
