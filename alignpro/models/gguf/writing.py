"""Model and tokenizer as a GGUF file: Llama, Qwen2 and Qwen3, as llama.cpp computes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignpro.errors import ModelError
from alignpro.models.gguf.configuration import llama3_divisors
from alignpro.models.gguf.vocabulary import Vocabulary, describe_tokenizer
from alignpro.prompting.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

_SCALINGS = ("default", "linear", "llama3")
_TABLES = ("token_embd.weight", "output.weight")
"""Embedding and head, which are never stored in fewer than 8 bits: their errors are those of whole tokens."""
_LARGEST_F16 = 65504.0

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class _Entry:
    """A weight on its way into the file."""

    name: str
    kind: Any
    """gguf's `GGMLQuantizationType`."""
    weight: Tensor
    heads: int = 0
    """Of a projection whose rotated features llama.cpp keeps in pairs; 0 for other weights."""


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    quantization: str = "f32",
    name: str,
    title: str | None = None,
) -> None:
    """Write a model to a GGUF file with its tokenizer and its chat template.

    Vectors are always stored in float32. With fewer than 8 bits, embedding and head have 8; a matrix whose rows are not
    a whole number of blocks is stored in float16, as in llama.cpp's own conversion.

    Args:
        model: A causal language model without an adapter.
        tokenizer: Its tokenizer.
        path: The file to write.
        quantization: How matrices are stored, one of `QUANTIZATIONS`; ``f32`` is exact.
        name: The model's name in messages.
        title: Its name in the file; ``name`` if absent.

    Raises:
        ModelError: The architecture, something that the configuration asks for, or the tokenizer cannot be written, or a
            weight does not fit the quantization.
        OSError: The file cannot be written.
    """
    from gguf import GGUFWriter

    config = model.config
    check_architecture(model, name)
    vocabulary = describe_tokenizer(tokenizer, size=config.vocab_size, end_ids=_end_ids(model, tokenizer), name=name)
    writer = GGUFWriter(None, config.model_type)
    _add_configuration(writer, config, quantization, title or name)
    _add_vocabulary(writer, vocabulary)
    divisors = _divisors(config)
    if divisors is not None:
        writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    entries = list(_entries(model, quantization))
    for entry in entries:
        block, size = _block(entry.kind)
        nbytes = entry.weight.numel() // block * size
        writer.add_tensor_info(
            entry.name, tuple(entry.weight.shape), np.dtype(np.float32), nbytes, raw_dtype=entry.kind
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for entry in entries:
            writer.write_tensor_data(_stored(entry, name))
    finally:
        writer.close()


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn or a text: what the chat template writes after an answer, then those of the model."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    of_model = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not tokenizer.chat_template:
        return of_model
    try:
        return [ChatTemplate(tokenizer).end_token_id, *of_model]
    except ModelError as error:
        logger.warning("%s; the file does not say which token it writes after an answer", error)
        return of_model


def check_architecture(model: PreTrainedModel, name: str) -> None:
    """Check that llama.cpp computes what the model computes.

    Raises:
        ModelError: It does not; the message names what differs.
    """
    config = model.config
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    refused = {
        f"architecture {config.model_type}": config.model_type not in ("llama", "qwen2", "qwen3"),
        f"class {type(model).__name__}": not type(model).__name__.endswith("ForCausalLM"),
        f"hidden_act {getattr(config, 'hidden_act', None)}": getattr(config, "hidden_act", None) != "silu",
        f"rope_type {scaling}": scaling not in _SCALINGS,
        "a sliding window": bool(getattr(config, "use_sliding_window", False)),
        "attention_bias": config.model_type == "qwen3" and bool(getattr(config, "attention_bias", False)),
    }
    if reasons := [what for what, is_refused in refused.items() if is_refused]:
        raise ModelError(
            f"model {name}: {reasons[0]} cannot be written to GGUF; Llama, Qwen2 and Qwen3 can, with whole attention, SiLU "
            f"and the RoPE scalings {', '.join(_SCALINGS)}"
        )


def _add_configuration(writer: Any, config: Any, quantization: str, title: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(LlamaFileType["ALL_F32" if quantization == "f32" else f"MOSTLY_{quantization.upper()}"])
    if quantization[0] == "q":
        writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _divisors(config: Any) -> Array | None:
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    return llama3_divisors(rope, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _entries(model: PreTrainedModel, quantization: str) -> Iterator[_Entry]:
    """Yield the model's weights by their names in the file; a head that shares the embedding's weight is left out."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = model.config
    (architecture,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == config.model_type]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    for full, weight in model.state_dict().items():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = f"{names.get_name(full.rpartition('.')[0])}.{full.rpartition('.')[2]}"
        heads = 0
        if config.model_type == "llama" and ".attn_q." in name:
            heads = config.num_attention_heads
        elif config.model_type == "llama" and ".attn_k." in name:
            heads = config.num_key_value_heads
        yield _Entry(name, _kind(name, weight, quantization), weight, heads)


def _kind(name: str, weight: Tensor, quantization: str) -> Any:
    from gguf import GGMLQuantizationType

    if weight.ndim == 1:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[quantization.upper()]
    if name in _TABLES and quantization[:2] in ("q4", "q5"):
        kind = GGMLQuantizationType.Q8_0
    return kind if weight.shape[-1] % _block(kind)[0] == 0 else GGMLQuantizationType.F16


def _block(kind: Any) -> tuple[int, int]:
    """The elements and the bytes of a block."""
    from gguf import GGML_QUANT_SIZES

    elements, size = GGML_QUANT_SIZES[kind]
    return elements, size


def _stored(entry: _Entry, model: str) -> Array:
    from gguf import GGMLQuantizationType, quantize

    array: Array = entry.weight.detach().float().cpu().numpy()
    largest = float(np.abs(array).max(initial=0.0))
    if not math.isfinite(largest):
        raise ModelError(f"model {model}: weight {entry.name} has values that are not finite; train it again")
    if entry.kind == GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        raise ModelError(
            f"model {model}: weight {entry.name} has a value of {largest:.3g}, too large for f16; take bf16"
        )
    if entry.heads:
        array = pair_rotated(array, entry.heads)
    stored: Array = quantize(np.ascontiguousarray(array), entry.kind)
    return stored


def pair_rotated(weight: Array, heads: int) -> Array:
    """Reorder the rows of a query or key projection: transformers rotates halves of a head, llama.cpp neighbours.

    Args:
        weight: (heads × width, …).
        heads: The number of heads of the projection.
    """
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
