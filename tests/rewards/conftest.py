"""Tiny random models with a byte-level tokenizer, made once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "<bos>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_byte_tokenizer(
    chat_template: str | None = TEMPLATE, pad_token: str | None = "<pad>"
) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, and special tokens."""
    special = ["<pad>", "<bos>", "<eos>", "[system]", "[user]", "[assistant]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token=pad_token, model_max_length=4096
    )
    fast.chat_template = chat_template
    return fast


def make_llama_config(**fields) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        **fields,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Return a factory of tokenizers; see `make_byte_tokenizer`."""
    return make_byte_tokenizer


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., LlamaConfig]:
    """Return a factory of configurations of a tiny model."""
    return make_llama_config


@pytest.fixture(scope="session")
def reward_model_path(tmp_path_factory) -> Path:
    """Save a classifier with one output and its own pad token."""
    path = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(0)
    LlamaForSequenceClassification(make_llama_config(num_labels=1, pad_token_id=0)).save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def language_model_path(tmp_path_factory) -> Path:
    """Save a causal language model, which has no score head."""
    path = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(1)
    LlamaForCausalLM(make_llama_config()).save_pretrained(path)
    make_byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def encoder_path(tmp_path_factory) -> Path:
    """Save a BERT encoder with absolute positions and a tokenizer without chat template."""
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(2)
    BertModel(
        BertConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
    ).save_pretrained(path)
    make_byte_tokenizer(chat_template=None).save_pretrained(path)
    return path
