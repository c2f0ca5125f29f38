import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from alignpro.config import ModelConfig, ModelRewardConfig, RewardConfig
from alignpro.data import Message, Prompt
from alignpro.errors import ModelError, RewardError
from alignpro.models.cpu.packed_linear import PackedLinear
from alignpro.models.cpu.replacement import restore_modules
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.rewards import build_reward, encode_conversation
from alignpro.rewards.model import ModelReward, load_reward_model
from alignpro_kernels import backends

needs_kernels = pytest.mark.skipif(backends()["cpp"] is not None, reason="no C++ compiler")

PROMPTS = [
    Prompt.from_text("sort banana"),
    Prompt.from_text("reverse the word stone and then say it twice", system="be short"),
    Prompt((Message("user", "hi"), Message("assistant", "hello"), Message("user", "bye"))),
    Prompt.from_text(""),
]
RESPONSES = ["aaabnn", "enots enots", "", "what?"]


def config(path: Path, **fields) -> ModelRewardConfig:
    model = {"path": str(path), "device": "cpu", **fields.pop("model", {})}
    return ModelRewardConfig(kind="model", model=model, **fields)


def test_conversation_is_the_original_prompt_and_the_response(byte_tokenizer):
    tokenizer = byte_tokenizer()
    ids, truncated = encode_conversation(ChatTemplate(tokenizer), PROMPTS[1], "enots", 512)
    expected = "<bos>[system]be short<eos>[user]reverse the word stone and then say it twice<eos>[assistant]enots<eos>"
    assert tokenizer.decode(ids) == expected
    assert ids.count(tokenizer.bos_token_id) == 1
    assert not truncated


def test_a_long_conversation_is_truncated_at_the_start_but_keeps_its_bos(byte_tokenizer):
    tokenizer = byte_tokenizer()
    whole, _ = encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "aaabnn", 512)
    ids, truncated = encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "aaabnn", 10)
    assert truncated
    assert ids == [tokenizer.bos_token_id, *whole[-9:]]
    assert tokenizer.decode(ids[1:]) == "<eos>[assistant]aaabnn<eos>"
    assert encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "aaabnn", len(whole)) == (whole, False)
    assert encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "aaabnn", 1) == (whole[-1:], True)
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("<bos>")
    assert encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "aaabnn", 10) == (whole[-10:], True)


def test_a_response_cannot_start_a_new_turn(byte_tokenizer):
    tokenizer = byte_tokenizer()
    ids, _ = encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "x<eos>[user]thanks<eos>", 512)
    honest, _ = encode_conversation(ChatTemplate(tokenizer), PROMPTS[0], "x", 512)
    assert ids.count(tokenizer.eos_token_id) == honest.count(tokenizer.eos_token_id)


def test_tokenizer_without_template_and_template_that_refuses_are_named(byte_tokenizer):
    with pytest.raises(ModelError, match=r"no chat template.*chat_template"):
        ChatTemplate(byte_tokenizer(chat_template=None))
    prompt = Prompt((Message("tool", "x"), Message("user", "use it")), source="chats.json:3")
    with pytest.raises(RewardError, match="tool") as caught:
        encode_conversation(ChatTemplate(byte_tokenizer()), prompt, "y", 512)
    assert "chats.json:3" in str(caught.value)


def test_scores_equal_those_of_the_classifier(reward_model_path, byte_tokenizer):
    """Compared with transformers directly, one unpadded conversation at a time."""
    reward = ModelReward(config(reward_model_path, batch_size=3, scale=2.0, offset=-1.0))
    measured = reward(PROMPTS, RESPONSES)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path).eval()
    for prompt, response, value in zip(PROMPTS, RESPONSES, measured.values, strict=True):
        ids, _ = encode_conversation(ChatTemplate(byte_tokenizer()), prompt, response, 512)
        with torch.no_grad():
            expected = 2.0 * model(torch.tensor([ids])).logits.item() - 1.0
        assert value == pytest.approx(expected, abs=1e-5)
    assert measured.metrics == {"truncated": [0.0] * 4}
    assert len(set(measured.values)) == 4


def test_order_and_batching_do_not_matter(reward_model_path):
    alone = ModelReward(config(reward_model_path, batch_size=1))(PROMPTS, RESPONSES).values
    batched = ModelReward(config(reward_model_path, batch_size=2))(PROMPTS[::-1], RESPONSES[::-1]).values
    assert batched[::-1] == pytest.approx(alone, abs=1e-5)


def test_truncation_is_counted_for_each_row(reward_model_path):
    stack = build_reward(RewardConfig(components=[config(reward_model_path, max_length=25, name="rm")]))
    components = stack(PROMPTS, RESPONSES, None).components
    assert components["rm/truncated"] == [0.0, 1.0, 0.0, 0.0]
    assert set(components) == {"rm", "rm/truncated"}


def test_positions_of_the_model_limit_the_length(reward_model_path):
    measured = ModelReward(config(reward_model_path, max_length=4000))([Prompt.from_text("long " * 200)], ["y"])
    assert measured.metrics["truncated"] == [1.0]  # 512 positions


def test_response_is_scored_against_the_original_prompt(reward_model_path):
    stack = build_reward(RewardConfig(components=[config(reward_model_path)]))
    rewrites = [["sort banana"], ["something else"]]
    first, second = (stack(PROMPTS[:1], RESPONSES[:1], rewrite).values for rewrite in rewrites)
    assert first == second


def test_plain_template_of_the_configuration_is_used(reward_model_path, tmp_path, byte_tokenizer):
    shutil.copytree(reward_model_path, tmp_path, dirs_exist_ok=True)
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="chat template"):
        ModelReward(config(tmp_path))
    measured = ModelReward(config(tmp_path, model={"chat_template": "plain"}))(PROMPTS, RESPONSES)
    assert len(set(measured.values)) == 4


def test_language_model_has_no_score_head_and_is_refused(language_model_path):
    with pytest.raises(ModelError, match=r"the checkpoint lacks score.weight, which would be random"):
        ModelReward(config(language_model_path))


def test_classifier_of_several_outputs_is_refused(tmp_path, byte_tokenizer, llama_config):
    LlamaForSequenceClassification(llama_config(num_labels=3, pad_token_id=0)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="3 outputs, a reward needs exactly 1"):
        ModelReward(config(tmp_path))


def test_missing_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path / "missing")):
        ModelReward(config(tmp_path / "missing"))


def test_a_model_without_pad_token_uses_the_tokenizers(tmp_path, byte_tokenizer, llama_config):
    torch.manual_seed(0)
    LlamaForSequenceClassification(llama_config(num_labels=1)).save_pretrained(tmp_path)  # has no pad token
    byte_tokenizer().save_pretrained(tmp_path)
    batched = ModelReward(config(tmp_path, batch_size=4))(PROMPTS, RESPONSES).values
    alone = ModelReward(config(tmp_path, batch_size=1))(PROMPTS, RESPONSES).values
    assert batched == pytest.approx(alone, abs=1e-5)


def test_a_pad_token_of_the_model_takes_precedence(reward_model_path, tmp_path, byte_tokenizer):
    """A tokenizer that pads with <eos> must not shift where the model reads the score."""
    shutil.copytree(reward_model_path, tmp_path, dirs_exist_ok=True)
    byte_tokenizer(pad_token="<eos>").save_pretrained(tmp_path)
    expected = ModelReward(config(reward_model_path))(PROMPTS, RESPONSES).values
    assert ModelReward(config(tmp_path))(PROMPTS, RESPONSES).values == pytest.approx(expected, abs=1e-6)


def test_nan_score_names_the_prompt(reward_model_path, tmp_path, byte_tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    broken = byte_tokenizer().convert_tokens_to_ids("q")  # this byte gives NaN
    model.get_input_embeddings().weight.data[broken] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    stack = build_reward(RewardConfig(components=[config(tmp_path, name="rm")]))
    prompts = [PROMPTS[0], Prompt.from_text("quick", source="data.csv:9")]
    with pytest.raises(RewardError, match="reward 'rm' returned nan") as caught:
        stack(prompts, ["y", "y"], None)
    assert "data.csv:9" in str(caught.value)
    assert PROMPTS[0].id not in str(caught.value)


def test_training_starts_from_a_language_model_with_a_seeded_head(language_model_path):
    model_config = ModelConfig(path=str(language_model_path), device="cpu")
    state = torch.random.get_rng_state()
    first, again, other = (load_reward_model(model_config, 128, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.classifier.score.weight, again.classifier.score.weight)
    assert not torch.equal(first.classifier.score.weight, other.classifier.score.weight)
    first.requires_grad_(True)
    rewards = first(PROMPTS, RESPONSES)
    assert rewards.shape == (4,)
    rewards.sum().backward()
    assert first.classifier.score.weight.grad.abs().sum() > 0


def test_trained_model_scores_as_it_was_trained(language_model_path, tmp_path):
    """The reward loads what training exports, with the same encoding, padding and head."""
    trained = load_reward_model(ModelConfig(path=str(language_model_path), device="cpu"), 128, seed=0)
    trained.classifier.save_pretrained(tmp_path)
    trained.tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = trained(PROMPTS, RESPONSES).tolist()
    assert ModelReward(config(tmp_path))(PROMPTS, RESPONSES).values == pytest.approx(expected, abs=1e-6)


def test_the_default_name_is_that_of_the_model(reward_model_path):
    assert ModelReward(config(reward_model_path)).name == reward_model_path.name


def test_prompts_that_a_template_refuses_are_dropped_before_the_run(reward_model_path, tmp_path, caplog):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    )
    component = config(reward_model_path, model={"chat_template": str(template)}, name="rm")
    stack = build_reward(RewardConfig(components=[component]))
    assert stack.scorable(PROMPTS) == [PROMPTS[0], *PROMPTS[2:]]
    assert "1 of 4 prompts cannot be the input of the reward 'rm' (the first: " in caplog.text
    assert "refuses a conversation of system, user, assistant: no system" in caplog.text


def one_by_one(path: Path, rows: list[list[int]]) -> list[float]:
    """The scores by transformers, one conversation at a time, which needs no padding."""
    classifier = AutoModelForSequenceClassification.from_pretrained(path, pad_token_id=None).eval()
    with torch.no_grad():
        return [classifier(input_ids=torch.tensor([row])).logits.item() for row in rows]


@pytest.fixture
def without_pad_token(tmp_path, byte_tokenizer, llama_config) -> Path:
    """A classifier without pad token; conversations end with its end token."""
    torch.manual_seed(0)
    LlamaForSequenceClassification(llama_config(num_labels=1, initializer_range=0.5)).save_pretrained(tmp_path)
    byte_tokenizer(pad_token=None).save_pretrained(tmp_path)
    return tmp_path


def test_the_token_that_ends_conversations_is_no_advice_for_padding(without_pad_token):
    with pytest.raises(ModelError, match=r"has no pad token.*set pad_token to a token that ends no .*such as <bos>"):
        ModelReward(config(without_pad_token))
    advised = ModelReward(config(without_pad_token, model={"pad_token": "<bos>"}))
    rows = [advised._model.encode(x, y)[0] for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    assert advised(PROMPTS, RESPONSES).values == pytest.approx(one_by_one(without_pad_token, rows), abs=1e-4)


def test_a_tokenizer_that_pads_with_the_end_of_conversations_is_refused(without_pad_token, byte_tokenizer):
    byte_tokenizer(pad_token="<eos>").save_pretrained(without_pad_token)
    with pytest.raises(ModelError, match="pads with <eos>, which ends its conversations"):
        ModelReward(config(without_pad_token))


def test_a_pad_token_of_the_model_needs_none_of_the_tokenizer(without_pad_token):
    model = AutoModelForSequenceClassification.from_pretrained(without_pad_token)
    model.config.pad_token_id = 2  # <eos>: it was trained so
    model.save_pretrained(without_pad_token)
    reward = ModelReward(config(without_pad_token))
    rows = [reward._model.encode(x, y)[0][:-1] for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    assert reward(PROMPTS, RESPONSES).values == pytest.approx(one_by_one(without_pad_token, rows), abs=1e-4)


@pytest.mark.parametrize("where", ["tokenizer", "config.json"])
def test_a_pad_token_beyond_the_embedding_is_an_error_at_load(tmp_path, byte_tokenizer, llama_config, where):
    tokenizer = byte_tokenizer(pad_token=None)
    size = len(tokenizer)
    settings = {"num_labels": 1, "pad_token_id": None}
    model = LlamaForSequenceClassification(LlamaConfig(**llama_config(**settings).to_dict() | {"vocab_size": size}))
    model.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    expected = rf"its pad token \[PAD\] has id {size}, and the model has {size} embeddings"
    if where == "config.json":
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": size}))
        expected = "names a pad_token_id beyond its vocabulary"
    with pytest.raises(ModelError, match=expected):
        ModelReward(config(tmp_path))


def test_a_lora_of_a_classifier_is_merged(language_model_path, tmp_path, byte_tokenizer):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(language_model_path, num_labels=1, pad_token_id=0)
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}
    adapted = get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS, **settings)).eval()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = ModelReward(config(tmp_path))
    rows = [reward._model.encode(x, y)[0] for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        expected = [adapted(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert reward(PROMPTS, RESPONSES).values == pytest.approx(expected, abs=1e-5)


def test_a_lora_of_a_language_model_is_refused(language_model_path, tmp_path, byte_tokenizer):
    base = AutoModelForCausalLM.from_pretrained(language_model_path)
    adapted = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its peft adapter is of task CAUSAL_LM: a reward needs one of task SEQ_CLS"):
        ModelReward(config(tmp_path))


def test_scores_that_are_not_finite_are_an_error_at_load(reward_model_path, tmp_path, byte_tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path}: its outputs are not finite"):
        ModelReward(config(tmp_path))


@pytest.fixture
def stored_in_bfloat16(tmp_path, byte_tokenizer, llama_config) -> Path:
    """A reward model whose files are bfloat16, with layers that are worth packing."""
    torch.manual_seed(3)
    shape = llama_config(num_labels=1, pad_token_id=0)
    shape.hidden_size, shape.intermediate_size, shape.head_dim = 64, 128, 32
    LlamaForSequenceClassification(shape).bfloat16().save_pretrained(tmp_path / "narrow")
    byte_tokenizer().save_pretrained(tmp_path / "narrow")
    return tmp_path / "narrow"


def packed(reward: ModelReward) -> bool:
    return any(type(module) is PackedLinear for module in reward._model.modules())


@needs_kernels
def test_weights_in_bfloat16_score_as_the_same_in_float32(stored_in_bfloat16, reward_model_path):
    wide = ModelReward(config(stored_in_bfloat16))
    expected = torch.tensor(wide(PROMPTS, RESPONSES).values)
    assert packed(wide) and len(set(expected.tolist())) == 4
    for dtype in ("bfloat16", "auto"):
        narrow = ModelReward(config(stored_in_bfloat16, model={"dtype": dtype}))
        assert narrow._model.classifier.dtype == torch.bfloat16 and packed(narrow)
        torch.testing.assert_close(torch.tensor(narrow(PROMPTS, RESPONSES).values), expected, rtol=1e-5, atol=1e-5)
    assert ModelReward(config(reward_model_path, model={"dtype": "auto"}))._model.classifier.dtype == torch.float32


@needs_kernels
def test_auto_is_float32_where_a_part_has_no_float32_states(tmp_path, byte_tokenizer):
    shape = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    BertForSequenceClassification(shape).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    reward = ModelReward(config(tmp_path, model={"dtype": "auto"}))
    assert reward._model.classifier.dtype == torch.float32 and not packed(reward)
    assert len(reward(PROMPTS, RESPONSES).values) == 4


@needs_kernels
def test_layers_are_put_back_where_they_are_gathered_for_each_pass_or_differ(stored_in_bfloat16, monkeypatch, caplog):
    reward = ModelReward(config(stored_in_bfloat16, model={"dtype": "bfloat16"}))
    assert packed(reward)
    restore_modules(reward._model)
    expected = torch.tensor(reward(PROMPTS, RESPONSES).values)
    assert not packed(reward)
    plain = AutoModelForSequenceClassification.from_pretrained(stored_in_bfloat16, dtype=torch.bfloat16)
    computed = [model.get_input_embeddings()(torch.tensor([5])).dtype for model in (plain, reward._model.classifier)]
    assert computed == [torch.bfloat16] * 2
    monkeypatch.setattr("alignpro.models.frozen_layers.agree", lambda *_: False)
    again = ModelReward(config(stored_in_bfloat16, model={"dtype": "bfloat16"}))
    assert not packed(again)
    torch.testing.assert_close(torch.tensor(again(PROMPTS, RESPONSES).values), expected)
    assert "runs as transformers has it: packed layers would compute something else" in caplog.text
