import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignpro.config import ModelConfig
from alignpro.errors import ModelError
from alignpro.prompting.template_source import PLAIN_TEMPLATE
from alignpro.prompting.tokenization import load_tokenizer

TEMPLATE = "{% for message in messages %}<u>{{ message.content }}</s>{% endfor %}"


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a tokenizer with the given special tokens and chat template."""

    def save_tokenizer(chat_template=None, **special):
        vocabulary = ["<s>", "</s>", "<pad>", "<u>", *"abcx"]
        core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="x"))
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save_tokenizer


def test_a_complete_tokenizer_is_loaded_as_it_is(save):
    path = save(TEMPLATE, eos_token="</s>", pad_token="<pad>")
    tokenizer = load_tokenizer(ModelConfig(path=path))
    assert (tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id) == (TEMPLATE, 2, 1)
    assert tokenizer.encode("cab", add_special_tokens=False) == [6, 4, 5]


def test_tokenizer_named_apart_from_the_model(save, tmp_path):
    path = save(TEMPLATE, pad_token="<pad>")
    (tmp_path / "weights").mkdir()
    assert load_tokenizer(ModelConfig(path=str(tmp_path / "weights"), tokenizer=path)).pad_token == "<pad>"


def test_directory_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ModelError, match=r"the directory has no tokenizer .*name one in `tokenizer`"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_tokenizer_without_vocabulary(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(ModelError, match=r"its tokenizer has no vocabulary"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_missing_directory(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere: no such directory; `path` names"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match=r"nowhere: no such directory; `tokenizer` names"):
        load_tokenizer(ModelConfig(path="hub/model", tokenizer="./nowhere"))


def test_damaged_tokenizer(save, tmp_path):
    path = save(TEMPLATE, pad_token="<pad>")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load its tokenizer"):
        load_tokenizer(ModelConfig(path=path))


def test_no_chat_template(save):
    path = save(None, eos_token="</s>", pad_token="<pad>")
    with pytest.raises(
        ModelError, match=r"no chat template; set chat_template=plain .* or chat_template to a Jinja file"
    ):
        load_tokenizer(ModelConfig(path=path))
    assert load_tokenizer(ModelConfig(path=path, chat_template="plain")).chat_template == PLAIN_TEMPLATE
    assert load_tokenizer(ModelConfig(path=path), require_chat_template=False).chat_template is None


def test_chat_template_from_a_file(save, tmp_path):
    path = save(None, pad_token="<pad>")
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    assert load_tokenizer(ModelConfig(path=path, chat_template=str(file))).chat_template == TEMPLATE
    file.write_text("\n{% for message in messages %}")
    with pytest.raises(ModelError, match=r"chat\.jinja:2: "):
        load_tokenizer(ModelConfig(path=path, chat_template=str(file)))
    file.write_text("{{ raise_exception('not today') }}")
    with pytest.raises(ModelError, match=r"refuses a user turn: not today"):
        load_tokenizer(ModelConfig(path=path, chat_template=str(file)))
    file.unlink()
    with pytest.raises(ModelError, match=r"no such file; expected `plain` or a Jinja file"):
        load_tokenizer(ModelConfig(path=path, chat_template=str(file)))


def test_no_pad_token(save):
    path = save(TEMPLATE, eos_token="</s>")
    with pytest.raises(ModelError, match=r"no pad token; set pad_token to .* \(its end token would do: </s>\)"):
        load_tokenizer(ModelConfig(path=path), require_pad_token=True)
    assert load_tokenizer(ModelConfig(path=path)).pad_token_id is None
    assert load_tokenizer(ModelConfig(path=path, pad_token="</s>"), require_pad_token=True).pad_token_id == 1
    with pytest.raises(ModelError, match=r"pad_token='<none>' is not in its vocabulary"):
        load_tokenizer(ModelConfig(path=path, pad_token="<none>"))
