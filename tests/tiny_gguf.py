"""Tiny models with tokenizers that llama.cpp knows, and GGUF files of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_transformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignpro.models.gguf.vocabulary import REGEXES
from alignpro.models.gguf.writing import write_gguf

pytest.importorskip("gguf", reason="the optional package gguf is not installed")

TEXTS = (
    "the quick brown fox",
    "In 1986, 12345 of them weren't there…  twice   over",
    "naïve café 東京 🙂\n\n\tdef f(x):\n        return x**2  # 100%",
    "<|im_start|>user\nwhat's 2048 + 77?<|im_end|>\n",
    "cafe\u0301 reçu",
)
"""Digits, runs of blanks, scripts, special tokens, and an accent apart from its letter."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLITS = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}
"""Architecture → llama.cpp's name of the split of its tokenizer."""


def _pre_tokenizer(split: str) -> Any:
    if split in REGEXES:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(REGEXES[split]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


@cache
def bpe_tokenizer(split: str = "smollm") -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer with a few merges, of numbers too. Do not modify it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(split)
    backend.decoder = decoders.ByteLevel()
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "the fox 12 12 34 123 user assistant"] * 3, trainer)
    backend.add_tokens(["<think>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(architecture: str, split: str | None = None, **settings: Any) -> PreTrainedModel:
    """Return a random model with a vocabulary a little larger than that of its tokenizer."""
    tokenizer = bpe_tokenizer(split or SPLITS[architecture])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return tiny_transformer(architecture, vocab_size=len(tokenizer) + 5, **ids | settings)


def save_gguf(path: Path, architecture: str = "llama", quantization: str = "f32", **settings: Any) -> PreTrainedModel:
    """Write a tiny model to a GGUF file and return it."""
    model = tiny_model(architecture, **settings)
    write_gguf(model, bpe_tokenizer(SPLITS[architecture]), path, quantization=quantization, name="tiny")
    return model
