"""What a checkpoint's weights without a place in the model say: that it is another model than its configuration tells."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch.nn import ModuleList
from transformers import PreTrainedModel

_CLASSIFIER = re.compile(r"(score|classifier|classification_head|qa_outputs)\.")
"""Heads of transformers' models for classes, scores and spans."""


def refuse_other_model(model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Raise if a checkpoint has a classifier's head, or more layers than its configuration.

    With tied embeddings a classifier lacks no weight of a language model, and fewer layers are a model that loads. All other
    weights without a place are as harmless as transformers takes them for: buffers of older versions, towers of other
    modalities.

    Args:
        model: The model as it was loaded.
        unused: Names of the weights that have no place in it.

    Raises:
        ValueError: It has.
    """
    names = sorted(unused)
    if heads := [name for name in names if _CLASSIFIER.match(name)]:
        raise ValueError(
            f"its files have the head of a classifier ({heads[0]}), such as a reward model's; name a language model"
        )
    if beyond := [name for name in names if _beyond_last_block(model, name)]:
        raise ValueError(
            f"its files have {len(beyond)} weights of layers that its config.json does not count, such as {beyond[0]}; take "
            "weights and config.json of the same model"
        )


def _beyond_last_block(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight belongs to a block of a stack of the model's that has fewer; layers that predict further tokens do not."""
    further = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    for parts in (name.split("."), [model.base_model_prefix, *name.split(".")]):
        for i, part in enumerate(parts):
            stack = _stack(model, ".".join(parts[:i])) if part.isdecimal() else None
            if stack is not None and int(part) >= len(stack) + further:
                return True
    return False


def _stack(model: PreTrainedModel, path: str) -> ModuleList | None:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return module if isinstance(module, ModuleList) else None
