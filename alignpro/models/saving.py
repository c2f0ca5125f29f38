"""Save language models in the format of transformers and peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from alignpro.models.language_model import LanguageModel
from alignpro.models.peft_types import is_peft_model
from alignpro.prompting.chat_template import ChatTemplate

if TYPE_CHECKING:
    from peft import PeftModel

BASE_DIRECTORY = "base"
"""Subdirectory of a saved adapter with its base model, if that exists nowhere else: a merged or a random model."""


def save_pretrained(language_model: LanguageModel, directory: Path) -> None:
    """Write a directory that ``from_pretrained`` (and `load_language_model`) reads: weights or adapter, and tokenizer.

    An adapter whose base model exists nowhere else is saved with it, in ``base/``. The adapter names its base model so
    that it is found from any working directory. A model's generation configuration names all tokens that end a turn here,
    so that it ends them elsewhere too.

    Raises:
        OSError: The files cannot be written.
    """
    model, causal = language_model.model, language_model.causal
    try:
        if is_peft_model(model):
            # Embeddings are never trained together with an adapter; by default peft would query the hub to find out.
            model.save_pretrained(str(directory), save_embedding_layers=False)
            adapter: Any = model.active_peft_config
            _sort_sets(directory / "adapter_config.json", adapter)
            if adapter.base_model_name_or_path == BASE_DIRECTORY:
                base = directory / BASE_DIRECTORY
                _save_model(causal, base, _stop_token_ids(language_model), state_dict=_base_weights(model))
            name_base(directory, directory)
        else:
            _save_model(model, directory, _stop_token_ids(language_model))
        language_model.tokenizer.save_pretrained(directory)
    except SafetensorError as error:  # raised, for example, when the disk is full
        raise OSError(f"{directory}: {error}") from error


def name_base(directory: Path, final: Path) -> None:
    """Make a saved adapter name its base model by an absolute path if that is a directory; for any other model, do nothing.

    Args:
        directory: Where the adapter has been saved.
        final: Where it will be, with its ``base/`` if it has one.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    base = final / BASE_DIRECTORY if (directory / BASE_DIRECTORY).is_dir() else Path(config["base_model_name_or_path"])
    if base.is_dir() or base.parent == final:
        config["base_model_name_or_path"] = str(base.absolute())
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _stop_token_ids(model: LanguageModel) -> tuple[int, ...]:
    """The tokens that end a turn: those of the model, and what its chat template writes after an answer."""
    if not model.tokenizer.chat_template:
        return model.end_token_ids
    return ChatTemplate(model.tokenizer, stop_token_ids=model.end_token_ids).stop_token_ids


def _save_model(model: Any, directory: Path, ends: Sequence[int], **options: Any) -> None:
    """Write a model with its generation configuration as it is, but for the tokens that end a turn.

    Published ones have settings without effect, with which older versions of transformers load a model and refuse to save it.
    """
    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory, **options)
    finally:
        model.generation_config = generation
    saved = copy.deepcopy(generation)
    if ends:
        saved.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    saved.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])


def _base_weights(model: PeftModel) -> dict[str, Tensor]:
    """The weights below an adapter, by their names in the base model."""
    tuner: Any = model.base_model
    own = (f".{getattr(tuner, 'prefix', 'prompt_encoder')}", ".modules_to_save.", ".trainable_tokens_")
    wrappers = (".base_layer", ".original_module", ".token_adapter")
    weights = {}
    for name, weight in model.get_base_model().state_dict().items():
        if not any(part in name for part in own):
            for wrapper in wrappers:
                name = name.replace(wrapper, "")
            weights[name] = weight
    return weights


def _sort_sets(file: Path, adapter: Any) -> None:
    """Sort the sets of an adapter's configuration: peft writes them in an order that changes from process to process."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content |= {
        name: sorted(value) for name, value in vars(adapter).items() if isinstance(value, set) and name in content
    }
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
