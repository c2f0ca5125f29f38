"""Tokenizers in GGUF files: byte-level BPE, with the way in which text is split before its merges apply.

A file has tokens, merges and the name of the split. Which names transformers' reader knows depends on its version; those below,
and what else belongs to a name in llama.cpp, are set here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignpro.errors import ModelError
from alignpro.models.gguf.header import Header

logger = logging.getLogger(__name__)

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, as llama.cpp numbers them."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {"qwen2": rf"{_LETTERS}|\p{{N}}{_REST}", "llama-bpe": rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}"}
"""Name of a split → its regular expression, as Qwen 2 to 3 and Llama 3 have it."""

_SAME_REGEX = {
    "llama-bpe": (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "dbrx",
        "smaug-bpe",
    ),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
}
_LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "granite", "roberta-bpe")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Splits like that of GPT-2 in which each digit stands alone; transformers' reader takes them for GPT-2's."""
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Splits after which a piece that is in the vocabulary is one token, whatever the merges say."""
_COMPOSED = ("qwen2", "qwen35")
"""Splits of tokenizers that first bring the text into Unicode's composed form (NFC)."""


def read_tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """Read a file's tokenizer and its chat template.

    Raises:
        ModelError: A token that ends or begins texts would be read as several.
    """
    special = _named_tokens(header)
    # Without the names, transformers' reader adds tokens of its own to the vocabulary.
    loaded: Any = PreTrainedTokenizerFast.from_pretrained(
        str(header.path.parent), gguf_file=header.path.name, **special
    )
    for name, token in special.items():  # some versions of its converters give another one
        setattr(loaded, name, token)
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        _complete(loaded.backend_tokenizer, header)
    if (context := header.value("context_length")) is not None:
        loaded.model_max_length = int(context)
    _check_special_tokens(loaded, header)
    tokenizer: PreTrainedTokenizerBase = loaded
    return tokenizer


def end_token_ids(header: Header) -> list[int]:
    """Return the tokens that end a text or a turn, without repetition."""
    found = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return list(dict.fromkeys(int(each) for each in found if each is not None))


def _named_tokens(header: Header) -> dict[str, Any]:
    """Return the tokens that begin, end and pad texts and stand for what is unknown, by transformers' names."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {
        name: str(tokens[index]) if index is not None and index < len(tokens) else None for name, index in ids.items()
    }


def _complete(backend: Any, header: Header) -> None:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    regexes = [REGEXES[split] for split, names in _SAME_REGEX.items() if name in names]
    if regexes:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(regexes[0]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif name in _SINGLE_DIGITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name not in _LIKE_GPT2 and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning(
            "%s: its tokenizer splits text in a way that is not known (%s); GPT-2's is taken in its place, and some texts "
            "may have other tokens than in training",
            header.path,
            name,
        )
    if name in _WHOLE_WORDS:
        backend.model.ignore_merges = True
    if name in _COMPOSED:
        backend.normalizer = normalizers.NFC()


def _check_special_tokens(tokenizer: Any, header: Header) -> None:
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    ids = [*end_token_ids(header), header.metadata.get("tokenizer.ggml.bos_token_id")]
    for index in ids:
        if index is not None and index < len(tokens):
            read = tokenizer.encode(tokens[index], add_special_tokens=False)
            if read != [index]:
                raise ModelError(
                    f"{header.path}: its token {tokens[index]!r}, number {index}, would be read as {read}; take the "
                    "model's own tokenizer files instead (the key `tokenizer`), or another GGUF file of it"
                )


@dataclass
class Vocabulary:
    """A tokenizer as GGUF has it."""

    split: str
    tokens: list[str]
    kinds: list[int]
    """Of each token: `NORMAL`, `CONTROL`, `USER_DEFINED` or `UNUSED`."""
    merges: list[str]
    special: dict[str, int] = field(default_factory=dict)
    """``bos``, ``eos``, ``eot``, ``pad`` → token."""
    add_bos: bool = False
    chat_template: str | list[dict[str, str]] | None = None


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, size: int, end_ids: Sequence[int], name: str
) -> Vocabulary:
    """Return a tokenizer as GGUF has it.

    Args:
        tokenizer: A byte-level BPE tokenizer.
        size: The number of rows of the model's embedding; tokens without a text fill the vocabulary up to it.
        end_ids: Tokens that end the model's texts, beside the tokenizer's own, the most important first; GGUF has a place for
            one of them, and a warning names the others.
        name: The model's name in messages.

    Raises:
        ModelError: It is of another type, has no merges, splits text in a way that llama.cpp has no name for, or has
            more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = (
        json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    )
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE over characters" if model["type"] == "BPE" else model["type"]
        raise ModelError(f"model {name}: its tokenizer is {kind}; only byte-level BPE can be written to GGUF")
    if not model["merges"]:
        raise ModelError(
            f"model {name}: its tokenizer has no merges, without which llama.cpp does not load a vocabulary"
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    added = [
        (each["content"], each["id"], CONTROL if each["special"] else USER_DEFINED) for each in content["added_tokens"]
    ]
    for token, index, kind in [*((token, index, NORMAL) for token, index in model["vocab"].items()), *added]:
        if index >= size:
            raise ModelError(f"model {name}: token {token!r} has the number {index}, and the model has {size} tokens")
        tokens[index], kinds[index] = token, kind
    return Vocabulary(
        _split_name(content, name),
        tokens,
        kinds,
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        _special_tokens(tokenizer, end_ids, name),
        _adds_bos(tokenizer),
        _template(tokenizer),
    )


def _split_name(content: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name of the way in which a tokenizer splits text."""
    outer = content["pre_tokenizer"] or {"type": "none"}
    steps = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    kinds = [step["type"] for step in steps]
    normalizer = (content["normalizer"] or {"type": "none"})["type"]
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"] and normalizer in ("none", "NFC"):
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and last["use_regex"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"] and steps[0]["behavior"] == "Isolated":
            for split, regex in REGEXES.items():
                if steps[0]["pattern"] == {"Regex": regex} and not steps[0]["invert"]:
                    return split
    raise ModelError(
        f"model {name}: its tokenizer splits text ({' + '.join(kinds)}, normalizer {normalizer}) in a way that is not known "
        "here by llama.cpp's name for it; those of GPT-2, SmolLM, Qwen 2 to 3 and Llama 3 are"
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], name: str) -> dict[str, int]:
    others = [index for index in dict.fromkeys(end_ids) if index != tokenizer.eos_token_id]
    if others[1:]:
        left_out = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)} ({index})" for index in others[1:])
        logger.warning("%s: GGUF has a place for two end tokens; texts will not end at %s", name, left_out)
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": others[0] if others else None,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in found.items() if index is not None}


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    written: str | None = template
    return written
