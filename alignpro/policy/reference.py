"""The frozen reference of the KL penalty: which model it is, and how checkpoints identify its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor

from alignpro.config import PolicyConfig
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model


def load_reference(config: PolicyConfig, model: LanguageModel, *, adapter_is_new: bool) -> LanguageModel | None:
    """Load or copy the reference of a policy; None if it is the policy's model with its adapter switched off.

    Args:
        config: The policy's configuration; its ``reference`` may name another model than its start.
        model: The policy's model before training.
        adapter_is_new: Whether the policy starts from ``model`` without its adapter. If False, training continues on an
            adapter, which is part of the reference.

    Raises:
        ModelError: The reference cannot be loaded, or its vocabulary or the soft cap of its logits is another.
    """
    if config.reference in (None, config.path):
        return None if isinstance(model.model, PeftModel) and adapter_is_new else frozen_copy(model)
    reference = load_language_model(config.model_copy(update={"path": config.reference}))
    if reference.head.weight.shape[0] != model.head.weight.shape[0]:
        raise ModelError(
            f"reference {reference.name} has {reference.head.weight.shape[0]} vocabulary entries, policy {model.name} "
            f"has {model.head.weight.shape[0]}: KL needs the same vocabulary"
        )
    if reference.head.softcap != model.head.softcap:
        raise ModelError(
            f"reference {reference.name} has final_logit_softcapping={reference.head.softcap}, policy {model.name} "
            f"{model.head.softcap}: their KL is computed in one pass over both heads, which supports a single cap"
        )
    return reference


def frozen_copy(language_model: LanguageModel) -> LanguageModel:
    """Copy a model so that training does not change the copy; it shares untrained weights and keeps weights tied."""
    model = language_model.model
    shared = [language_model.tokenizer, *(w for w in model.parameters() if not w.requires_grad)]
    return copy.deepcopy(language_model, {id(part): part for part in shared}).requires_grad_(False).eval()


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits of a SHA-256 over names, dtypes, shapes and all bytes of named weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
