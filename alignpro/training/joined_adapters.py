"""Several LoRAs of one base model as a single LoRA, whose change of each weight is the weighted sum of theirs.

    W + Σ_k w_k s_k B_k A_k          of rank Σ_k r_k

It is the mixture in the space of weights. Next-token logits are a function of the weights that is not linear, so its logits
are those of the mixture, z_sft + Σ_k w_k (z_k − z_sft), to first order in the changes only; exactly, if the output layer alone
is adapted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.config import ModelConfig
from alignpro.errors import ModelError
from alignpro.models.loading import is_adapter, load_causal
from alignpro.models.mixture_files import Mixture
from alignpro.models.peft_types import is_peft_model
from alignpro.models.saving import name_base
from alignpro.prompting.tokenization import load_tokenizer

_JOINED = "joined"


def require_adapters(prompters: Sequence[str]) -> None:
    """Check that the directories of prompters hold adapters.

    Raises:
        ModelError: One holds a model with weights of its own.
    """
    for path in prompters:
        if not is_adapter(path):
            raise ModelError(f"model {path}: its weights are its own: only LoRAs of one base model become one model")


def join_adapters(mixture: Mixture, config: ModelConfig, directory: Path, final: Path) -> None:
    """Write the LoRA Σ_k w_k s_k B_k A_k on the prompters' base model.

    Args:
        mixture: LoRAs and their weights.
        config: How the first one is loaded.
        directory: Where the adapter and its tokenizer are written.
        final: Where the directory will be.

    Raises:
        ModelError: The LoRAs do not act alike, so that no single LoRA is their sum.
    """
    model = load_causal(config)
    assert is_peft_model(model)  # see `require_adapters`
    names = [str(model.active_adapter)]
    try:
        for k, path in enumerate(mixture.prompters[1:], 1):
            model.load_adapter(path, f"{_JOINED}_{k}")
            names.append(f"{_JOINED}_{k}")
        _check_alike(model, names, mixture)
        tuner: Any = model.base_model
        tuner.add_weighted_adapter(names, list(mixture.weights), _JOINED, combination_type="cat")
        model.save_pretrained(str(directory), selected_adapters=[_JOINED], save_embedding_layers=False)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"mix: the LoRAs do not add up to one: {reason}; leave out --one-model") from error
    for file in (directory / _JOINED).iterdir():  # peft's place for an adapter with a name
        file.rename(directory / file.name)
    shutil.rmtree(directory / _JOINED)
    load_tokenizer(config).save_pretrained(directory)
    name_base(directory, final)


def _check_alike(model: Any, names: list[str], mixture: Mixture) -> None:
    for name, path in zip(names, mixture.prompters, strict=True):
        adapter = model.peft_config[name]
        what = {
            "an activated LoRA": getattr(adapter, "alora_invocation_tokens", None) is not None,
            "a DoRA": adapter.use_dora,
            "a LoRA with biases": adapter.bias != "none",
        }
        if kind := next((kind for kind, holds in what.items() if holds), None):
            raise ModelError(f"model {path}: it is {kind}, which does not add up with others: leave out --one-model")
