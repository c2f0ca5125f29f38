"""Models with random weights, and a tokenizer that makes every length exact, saved to disk like a user's models."""

from __future__ import annotations

import itertools
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.workload import BYTES, ModelShape

END, PAD = "<end of turn>", "<padding>"
_SPACE = "Ġ"
_LETTERS = ((0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
"""Ranges of characters that are neither blank nor combine with their neighbours: Chinese, Korean, private use."""


def characters(count: int) -> str:
    """Return one character per token: those by which byte-level vocabularies represent bytes, then others; none is blank.

    Raises:
        ValueError: There are fewer characters than ``count``.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = (chr(code) for first, end in _LETTERS for code in range(first, end))
    found = "".join(itertools.islice(itertools.chain(alphabet, others), count))
    if len(found) < count:
        raise ValueError(f"a vocabulary of {count}: only {len(found)} characters are available")
    return found


def make_tokenizer(chat_template: str, vocabulary: int = BYTES) -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per character, so that generated text has as many tokens when tokenized again.

    The end-of-turn and padding tokens lie outside the models' vocabulary: they are never sampled, every sequence has its
    full length, and decoding drops nothing. Text from a model with a larger vocabulary also has one token per character.
    """
    known = characters(vocabulary)
    indices = {token: index for index, token in enumerate([*known, END, PAD])}
    tokenizer = Tokenizer(models.WordLevel(indices, unk_token=known[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    made.chat_template = chat_template
    return made


def make_chat_template(before: str, after: str) -> str:
    """Return a Jinja template: a user's turn between two texts, an assistant's turn followed by the end of the turn."""
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}"
        f"{{%- else -%}}{before}{{{{ message['content'] }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{after}{{%- endif -%}}"
    )


def random_text(length: int, generator: random.Random) -> str:
    """Return random words of lower-case letters, ``length`` characters in total."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) <= length:
        words.append("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))))
    return _SPACE.join(words)[:length]


def make_model(
    shape: ModelShape,
    *,
    context: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Create a model with SDPA attention, in evaluation mode: that of the shape's directory, or with random weights.

    No token ends its sequences.

    Args:
        shape: The model.
        context: Its longest sequence in tokens, if its weights are random.
        seed: Of the random weights.
        dtype: Of the weights.
        device: Of the weights; the CPU if absent.
    """
    if shape.path is not None:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            shape.path, dtype=dtype, attn_implementation="sdpa"
        )
        loaded.generation_config = GenerationConfig()
        loaded.config.bos_token_id = loaded.config.eos_token_id = loaded.config.pad_token_id = None
        weights: torch.nn.Module = loaded
        weights.to(device or torch.device("cpu"))
        return loaded.eval()
    torch.manual_seed(seed)
    with device or torch.device("cpu"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            _config(shape, context), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


def num_parameters(shape: ModelShape) -> int:
    """Return the number of parameters; a tied weight counts once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(shape, 1))
    return sum(weight.numel() for weight in model.parameters())


def _config(shape: ModelShape, context: int) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return config
