"""A model directory that is measured in the place of random weights, and prompts from a file in the place of random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from transformers import AutoConfig, PreTrainedTokenizerBase

from alignpro.config import DataConfig, ModelConfig
from alignpro.data import load_prompts
from alignpro.errors import AlignProError
from alignpro.prompting.tokenization import load_tokenizer
from benchmarks.workload import ModelShape


def shape_of(directory: Path) -> ModelShape:
    """Return the shape of a model, for its floor.

    Raises:
        typer.BadParameter: It is no directory of a model whose layers the floor describes: attention and a gated MLP.
    """
    if not (directory / "config.json").is_file():
        raise typer.BadParameter(f"model {directory}: is not a directory with a model: it has no config.json")
    config: Any = AutoConfig.from_pretrained(directory).get_text_config()
    try:
        return ModelShape(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            config.vocab_size,
            config.model_type,
            bool(config.tie_word_embeddings),
            getattr(config, "head_dim", None),
            str(directory),
        )
    except AttributeError as error:
        raise typer.BadParameter(
            f"model {directory}: its config.json has no {error.name}, which the floor needs"
        ) from None


def read_texts(file: Path) -> list[str]:
    """Return the last turns of the prompts of a file, such as JSON Lines with a column ``prompt``.

    Raises:
        typer.BadParameter: The file cannot be read.
    """
    try:
        return [prompt.text for prompt in load_prompts(DataConfig(source=str(file))).prompts]
    except AlignProError as error:
        raise typer.BadParameter(str(error)) from None


def encode(directory: Path, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return texts as a model's prompts: user's turns in its chat template if it has one.

    Raises:
        typer.BadParameter: The directory has no usable tokenizer.
    """
    try:
        tokenizer = load_tokenizer(ModelConfig(path=str(directory)), require_chat_template=False)
    except AlignProError as error:
        raise typer.BadParameter(str(error)) from None
    return tuple(tuple(_encode(tokenizer, text)) for text in texts)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        plain: list[int] = tokenizer(text)["input_ids"]
        return plain
    turns = [{"role": "user", "content": text}]
    templated: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    ids: list[int] = templated["input_ids"]
    return ids
