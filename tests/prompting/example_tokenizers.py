"""Two kinds of tiny tokenizers: one token per character with Llama's template, byte-level BPE with Qwen's; and prompts."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignpro.data import Message, Prompt

LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{{ m.content | trim }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('system turns are not supported') }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "user assistant system", "a request, please: rewrite it"] * 20

DIALOGUE = (Message("user", "hi"), Message("assistant", "hello"), Message("user", "rewrite the request"))


def char_tokenizer():
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *characters])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )
    tokenizer.chat_template = LLAMA
    return tokenizer


def bpe_tokenizer(normalizer=None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    if normalizer is not None:
        core.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("\n\n", special=False)])
    tokenizer.chat_template = QWEN
    return tokenizer


def prompt(text, *context):
    return Prompt((*context, Message("user", text)), source="file:7")
