"""The demo's tokenizers and untrained models, as other parts of the project load them."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignpro.demo import models, world


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    models.save_untrained(directory)
    return directory


def render(tokenizer, text):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", ["target", "prompter"])
def test_saved_tokenizers_load_as_the_ones_that_were_built(saved, name):
    built = models.target_tokenizer() if name == "target" else models.prompter_tokenizer()
    loaded = AutoTokenizer.from_pretrained(saved / name)
    for record in world.prompter_records(50, 0):
        for text in (record["prompt"], record["rewrite"]):
            ids = loaded.encode(text, add_special_tokens=False)
            assert ids == built.encode(text, add_special_tokens=False)
            assert len(ids) == len(text)
            assert loaded.decode(ids, skip_special_tokens=True) == text
    assert render(loaded, "stone backwards??") == render(built, "stone backwards??")
    assert loaded.pad_token_id != loaded.eos_token_id


def test_the_prompter_encodes_any_text_and_the_target_has_an_unknown_token():
    text = "drehe „größe“ um  🙂\n"
    prompter = models.prompter_tokenizer()
    assert prompter.decode(prompter.encode(text), skip_special_tokens=True) == text
    target = models.target_tokenizer()
    assert target.encode("é") == [target.unk_token_id]
    assert target.decode(target.encode("UPPER lower\n 1?")) == "UPPER lower\n 1?"


def test_templates_end_where_the_answer_starts():
    target, prompter = models.target_tokenizer(), models.prompter_tokenizer()
    assert render(target, "sort: stone") == "<s>[INST]sort: stone[/INST]"
    assert render(prompter, "sort stone") == "<|im_start|><|user|>sort stone<|im_end|><|im_start|><|assistant|>"
    assert len(target.encode(render(target, "ab"), add_special_tokens=False)) == 5
    assert len(prompter.encode(render(prompter, "ab"), add_special_tokens=False)) == 7


def test_the_weights_fit_in_four_megabytes_and_load(saved):
    files = [saved / name / "model.safetensors" for name in ("target", "prompter")]
    assert sum(file.stat().st_size for file in files) < 4_000_000
    for name, family, size in (("target", "llama", 604_000), ("prompter", "qwen2", 303_000)):
        model = AutoModelForCausalLM.from_pretrained(saved / name)
        assert model.config.model_type == family
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(size, rel=0.01)
