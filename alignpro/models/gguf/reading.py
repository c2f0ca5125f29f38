"""A GGUF file as model and tokenizer of transformers, which reads and dequantizes its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from alignpro.errors import ModelError
from alignpro.models.gguf.configuration import ROPE_FACTORS, read_configuration
from alignpro.models.gguf.header import Header
from alignpro.models.gguf.vocabulary import end_token_ids, read_tokenizer


class ReadModel:
    """A model and its tokenizer from a GGUF file, in memory.

    Args:
        header: The file.
        dtype: Of the weights; float32 holds those of every quantization exactly.

    Raises:
        ModelError: transformers cannot read the architecture or the file, a tensor has no place in the model, or a weight
            of the model is not in the file.
    """

    def __init__(self, header: Header, dtype: torch.dtype = torch.float32) -> None:
        with _reading_errors(header):
            self.tokenizer = read_tokenizer(header)
            config = read_configuration(header)
            self.model = _read_weights(header, config, dtype)
        self.model.generation_config = _generation(self.tokenizer, end_token_ids(header))

    def save(self, directory: Path) -> None:
        """Write a directory that ``from_pretrained`` reads."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


@contextmanager
def _reading_errors(header: Header) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # the type depends on the entry of the file that transformers does not find or understand
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"its metadata has no {error}"
        raise ModelError(
            f"{header.path}: transformers cannot read this model of architecture {header.architecture}: {reason}"
        ) from error


def _read_weights(header: Header, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _check_names(header, model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(header.path.parent), gguf_file=header.path.name, config=config, dtype=dtype, output_loading_info=True
    )
    quantized, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{header.path}: lacks {len(missing)} weights of its architecture, such as {missing[0]}")
    # A model that was read from GGUF counts as quantized, which transformers does not save. This one does not.
    model.load_state_dict(quantized.state_dict(), assign=True)
    for name, buffer in quantized.named_buffers():  # those that are not saved, such as the rotary frequencies
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer)
    model.tie_weights()
    whole: PreTrainedModel = model.eval()
    return whole


def _check_names(header: Header, model: Any) -> None:
    """Refuse tensors that transformers' reader would drop: without them, a model computes something else."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layers = getattr(model.config, "num_hidden_layers", 0)
    # What predicts further tokens stands in layers after the model's own.
    own = [each for each in header.tensors if each.name not in ROPE_FACTORS and _layer(each.name) < layers]
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    if sum(math.prod(each.shape) for each in own) == sum(value.numel() for value in weights.values()):
        return
    architectures = [key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture]
    if not architectures:
        return  # transformers refuses it
    names = get_tensor_name_map(architectures[0], layers)
    parts = [name.rpartition(".") for name in weights]
    stems = {stem: names.get_name(stem) for stem, _, _ in parts}
    if None in stems.values():
        return  # weights that are merged or split on the way, such as experts, have no name of their own
    known = {f"{stems[stem]}.{ending}" for stem, _, ending in parts}
    if unread := [each.name for each in own if each.name not in known]:
        raise ModelError(
            f"{header.path}: transformers' reader of architecture {header.architecture} has no place for {len(unread)} of "
            f"its tensors, such as {unread[0]}"
        )


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _generation(tokenizer: Any, end_ids: list[int]) -> GenerationConfig:
    ends: Any = end_ids if len(end_ids) > 1 else next(iter(end_ids), None)
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
