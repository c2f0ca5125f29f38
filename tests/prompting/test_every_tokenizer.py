"""Text and completions with every kind of tokenizer: SentencePiece, byte-level BPE, WordPiece."""

from __future__ import annotations

import string

import pytest
from example_tokenizers import QWEN, bpe_tokenizer, char_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignpro.config import ModelConfig, PromptingConfig
from alignpro.data import Message, Prompt
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.tokenization import load_tokenizer

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(*, legacy: bool, template: str = ZEPHYR) -> PreTrainedTokenizerBase:
    """Return a tokenizer as Llama 2 has it, of letters, bytes, and two tokens that begin with a space."""
    characters = string.ascii_letters + string.digits + "<>/|[]., :"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *characters]
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys([*pieces, "\u2581E", "\u2581a", "</", "s>"]))
    }
    merges = [("\u2581", "E"), ("\u2581", "a"), ("<", "/"), ("s", ">")]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)
    tokenizer.chat_template = template
    return tokenizer


def prepending() -> PreTrainedTokenizerBase:
    """Return a tokenizer whose normalizer puts a space before every text between special tokens."""
    characters = string.ascii_letters + "<>/|[]., :\n"
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "\u2581", *characters, "\u2581E"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "E")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = ZEPHYR
    return tokenizer


def prefixing_bytes() -> PreTrainedTokenizerBase:
    """Return byte-level BPE that puts a space before every text, as RoBERTa's does."""
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def wordpiece() -> PreTrainedTokenizerBase:
    """Return a tokenizer of words and their parts, which drops spaces."""
    letters = string.ascii_lowercase + "<>/|"
    pieces = ["[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "explain"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[SEP]", cls_token="[CLS]")
    tokenizer.chat_template = ZEPHYR
    return tokenizer


KINDS = {
    "SentencePiece": lambda: sentencepiece(legacy=False),
    "SentencePiece, legacy": lambda: sentencepiece(legacy=True),
    "SentencePiece, Llama 2": lambda: sentencepiece(legacy=False, template=LLAMA2),
    "SentencePiece, legacy, Llama 2": lambda: sentencepiece(legacy=True, template=LLAMA2),
    "prepending": prepending,
    "bytes": bpe_tokenizer,
    "bytes with a space before": prefixing_bytes,
    "characters": char_tokenizer,
    "WordPiece": wordpiece,
}


@pytest.fixture(params=KINDS)
def tokenizer(request) -> PreTrainedTokenizerBase:
    return KINDS[request.param]()


@pytest.mark.parametrize("text", ["Explain", "explain a", "E", " Explain", "x\ny"])
def test_a_completion_has_the_tokens_of_the_whole_conversation(tokenizer, text: str) -> None:
    chat = ChatTemplate(tokenizer)
    question = [Message("user", "a question")]
    whole = chat.encode([*question, Message("assistant", text)], add_generation_prompt=False)
    pair = chat.encode(question) + chat.completion(text)
    assert whole[: len(pair)] == pair
    assert pair[-1] == chat.end_token_id
    assert chat.decode(chat.completion(text)).casefold() == chat.decode(tokenizer.encode(text)).casefold()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_completion_does_not_begin_with_a_space(legacy: bool) -> None:
    tokenizer = sentencepiece(legacy=legacy)
    completion = PrompterTemplate(tokenizer, PromptingConfig()).completion(Prompt.from_text("?"), "Explain")
    assert tokenizer.convert_ids_to_tokens(completion) == [*"Explain", "</s>"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_prompt_that_ends_with_a_space_is_continued_without_one(legacy: bool) -> None:
    """The tokens of the whole conversation do not begin with those of the prompt: the space merges with the answer."""
    tokenizer = sentencepiece(
        legacy=legacy, template=LLAMA2.replace("' [/INST]'", "' [/INST] '").replace("' ' + m", "m")
    )
    chat = ChatTemplate(tokenizer)
    question = [Message("user", "a")]
    whole = chat.encode([*question, Message("assistant", "Explain")], add_generation_prompt=False)
    pair = chat.encode(question) + chat.completion("Explain")
    assert pair != whole[: len(pair)]
    assert tokenizer.convert_ids_to_tokens(chat.completion("Explain"))[:7] == [*"Explain"]
    assert tokenizer.decode(pair, skip_special_tokens=True).strip() == (
        tokenizer.decode(whole, skip_special_tokens=True).strip()
    )


TEXTS = ["a </s> b", "</s>", "x</s>y</s>z", "a <s> </s>", "a<</s>/s> b", "[INST] </s>", "a  </s>  b", "E</s>E"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_text_of_special_tokens_is_kept_as_it_is(tokenizer, text: str, role: str) -> None:
    chat = ChatTemplate(tokenizer)

    def encode(content: str) -> list[int]:
        if role == "assistant":
            return chat.encode([Message("user", "a"), Message(role, content)], add_generation_prompt=False)
        return chat.encode([Message(role, content)])

    structural = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    assert [t for t in encode(text) if t in structural] == [t for t in encode("plain") if t in structural]
    if tokenizer.backend_tokenizer.decoder.__class__.__name__ != "WordPiece":  # which does not keep spaces of any text
        assert text.strip() in tokenizer.decode(encode(text))
        assert chat.decode(chat.completion(text)) == text.strip()


def test_ordinary_text_is_encoded_as_transformers_does(tokenizer) -> None:
    chat = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "Explain  a\nlong, 1 word"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert chat.encode([Message("user", messages[0]["content"])]) == expected


class TestPlain:
    """`chat_template: plain`, for base models."""

    def test_it_begins_with_bos_where_the_tokenizer_adds_it(self, tmp_path) -> None:
        for adds in (True, False):
            tokenizer = sentencepiece(legacy=False)
            tokenizer.chat_template = None
            tokenizer.add_bos_token = adds
            assert (tokenizer.encode("x")[0] == tokenizer.bos_token_id) == adds
            tokenizer.save_pretrained(tmp_path / str(adds))
            loaded = load_tokenizer(ModelConfig(path=str(tmp_path / str(adds)), chat_template="plain"))
            for chat in (ChatTemplate(loaded), ChatTemplate(tokenizer, "plain")):
                ids = chat.encode([Message("user", "a <s> b")])
                assert ids.count(tokenizer.bos_token_id) == adds
                assert (ids[0] == tokenizer.bos_token_id) == adds
                assert tokenizer.bos_token_id not in chat.completion("a <s>")

    def test_a_prompt_of_a_template_with_bos_has_one(self) -> None:
        chat = ChatTemplate(sentencepiece(legacy=False, template=LLAMA2))
        assert chat.encode([Message("user", "a")]).count(1) == 1


def test_sft_pairs_of_a_prompter_are_whole_conversations(tokenizer) -> None:
    prompter = PrompterTemplate(tokenizer, PromptingConfig())
    prompt = Prompt.from_text("a question")
    pair = prompter.encode(prompt) + prompter.completion(prompt, "Explain </s>")
    whole = prompter.chat.encode([*prompt.messages, Message("assistant", "Explain </s>")], add_generation_prompt=False)
    assert whole[: len(pair)] == pair


def test_a_template_without_an_end_token_ends_with_eos() -> None:
    tokenizer = sentencepiece(legacy=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}assistant: "
    chat = ChatTemplate(tokenizer)
    assert tokenizer.convert_ids_to_tokens(chat.completion("Explain"))[-3:] == ["i", "n", "</s>"]
    assert QWEN not in chat.template
