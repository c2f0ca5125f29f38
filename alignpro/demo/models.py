"""The untrained models of the embedded world: a Llama-type target and a Qwen2-type prompter with their own tokenizers.

The target's tokenizer has one token per printable ASCII character, the prompter's one per byte; ids, special tokens and
chat templates differ, as they do between real model families.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

CHARACTERS = string.ascii_lowercase + string.digits + " " + string.punctuation + string.ascii_uppercase + "\n"

CONTEXT = 128
"""Maximum sequence length of both models, in tokens."""

_TARGET_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "<<SYS>>")
_TARGET_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}[INST]{{ message['content'] }}[/INST]
  {%- elif message['role'] == 'assistant' -%}{{ message['content'] }}{{ eos_token }}
  {%- else -%}<<SYS>>{{ message['content'] }}<<SYS>>
  {%- endif -%}
{%- endfor -%}"""

_PROMPTER_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>")
_PROMPTER_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|><|' + message['role'] + '|>' + message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|><|assistant|>{%- endif -%}"""


def target_tokenizer() -> PreTrainedTokenizerFast:
    """The target's tokenizer: Llama's special tokens and ``[INST]`` template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_character_tokenizer([*_TARGET_SPECIAL, *CHARACTERS], unknown="<unk>"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["[INST]", "[/INST]", "<<SYS>>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TARGET_TEMPLATE
    return tokenizer


def prompter_tokenizer() -> Qwen2Tokenizer:
    """The prompter's tokenizer: Qwen's byte-level one without merges (one token per byte), and its template.

    It must be Qwen's own class, which `AutoTokenizer` loads for every model of type ``qwen2``, whatever was saved.
    """
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_PROMPTER_SPECIAL]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = _PROMPTER_TEMPLATE
    return tokenizer


def untrained_target(seed: int = 0) -> LlamaForCausalLM:
    """The target before training: 0.6 million parameters, tied embeddings, grouped-query attention."""
    shape = _shape(target_tokenizer(), hidden_size=128, intermediate_size=384, num_attention_heads=4)
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))


def untrained_prompter(seed: int = 0) -> Qwen2ForCausalLM:
    """The prompter before SFT: 0.26 million parameters, tied embeddings."""
    shape = _shape(prompter_tokenizer(), hidden_size=96, intermediate_size=192, num_attention_heads=3)
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=3))


def _shape(tokenizer: PreTrainedTokenizerBase, **sizes: int) -> dict[str, Any]:
    """What the configurations of both models have in common, and their sizes."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **sizes,
    }


def save_untrained(directory: Path, *, seed: int = 0) -> None:
    """Write ``directory/target`` and ``directory/prompter``: random weights, tokenizers, configuration."""
    untrained: list[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]] = [
        ("target", untrained_target(seed), target_tokenizer()),
        ("prompter", untrained_prompter(seed), prompter_tokenizer()),
    ]
    for name, model, tokenizer in untrained:
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def _character_tokenizer(vocabulary: list[str], *, unknown: str) -> Tokenizer:
    """One token per character, ids in the order of ``vocabulary``; other characters become ``unknown``."""
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
