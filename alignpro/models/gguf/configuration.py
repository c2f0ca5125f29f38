"""A model's configuration from a GGUF file: transformers' reader, and what it leaves out without saying so."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from alignpro.errors import ModelError
from alignpro.models.gguf.header import Header

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The RoPE scaling of all published Llama 3.x models, apart from its factor. A file has only the divisors that follow from it."""

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_configuration(header: Header) -> PreTrainedConfig:
    """Read a configuration and complete it.

    Raises:
        ModelError: The file scales rotary positions in a way that cannot be carried over.
    """
    config: Any = AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    _shorten_floats(config)
    if config.model_type == "qwen3" and (width := header.value("attention.key_length")) is not None:
        config.head_dim = int(width)
    if config.model_type in ("llama", "qwen3"):
        config.attention_bias = header.has_tensor(".attn_q.bias")
    if config.model_type == "llama":
        config.mlp_bias = header.has_tensor(".ffn_up.bias")
    _scale_rope(config, header)
    checked: PreTrainedConfig = config
    return checked


def _shorten_floats(config: Any) -> None:
    """Replace float32 values by the shortest decimal numbers that they round: 1e-05 for 9.999999747378752e-06."""
    for name, value in vars(config).items():
        if isinstance(value, float) and math.isfinite(value) and value == float(np.float32(value)):
            setattr(config, name, float(str(np.float32(value))))


def _scale_rope(config: Any, header: Header) -> None:
    tables = [tensor for tensor in header.tensors if tensor.name in ROPE_FACTORS]
    kind = header.value("rope.scaling.type", "none")
    if config.model_type not in ("llama", "mistral", "qwen2", "qwen3") and not tables:
        return  # transformers reads what the others have
    if not tables and kind == "none":
        return
    if not tables and kind == "linear":
        config.rope_parameters |= {"rope_type": "linear", "factor": float(header.value("rope.scaling.factor", 1.0))}
        return
    if [table.name for table in tables] == ["rope_freqs.weight"] and tables[0].quantization == 0 and kind == "none":
        found = np.fromfile(header.path, "<f4", math.prod(tables[0].shape), offset=tables[0].offset)
        scaling = config.rope_parameters | LLAMA3 | {"rope_type": "llama3"}
        kept = _kept_share(scaling, 2 * len(found))[-1]  # of the slowest frequency
        if kept < 1.0 / found[-1]:
            scaling["factor"] = round(float((1.0 - kept) / (1.0 / found[-1] - kept)), 4)
            if np.allclose(found, llama3_divisors(scaling, 2 * len(found)), rtol=1e-4):
                config.rope_parameters = scaling
                return
    what = f"rope.scaling.type {kind}" if kind != "none" else f"tensor {tables[0].name}"
    raise ModelError(
        f"{header.path}: scales rotary positions in a way that cannot be converted ({what}); no scaling, linear scaling and "
        "that of Llama 3 can"
    )


def llama3_divisors(rope: dict[str, Any], width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return by what Llama 3's scaling divides the frequency of each pair of features: (width/2,) float32.

    Source: Llama 3.1's reference implementation (``apply_scaling``); llama.cpp keeps the divisors in ``rope_freqs.weight``.

    Args:
        rope: ``rope_theta``, ``factor``, ``low_freq_factor``, ``high_freq_factor`` and ``original_max_position_embeddings``.
        width: The number of features of a head that are rotated.
    """
    kept = _kept_share(rope, width)
    return (1.0 / ((1.0 - kept) / rope["factor"] + kept)).astype(np.float32)


def _kept_share(rope: dict[str, Any], width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How much of each frequency is kept: 1 as it was, 0 divided by the factor."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return np.clip((turns - low) / (high - low), 0.0, 1.0)
