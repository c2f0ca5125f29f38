"""Tokens that models compute, counted where they enter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Call(NamedTuple):
    """Forward passes that are told apart."""

    model: str
    grad: bool
    """Whether gradients were recorded."""
    width: int
    """Tokens of each sequence."""


class TokenCounter:
    """Counts what goes through the embeddings of some models, padding included.

    Args:
        models: Name → model.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        self.calls: Counter[Call] = Counter()
        """Tokens."""
        for name, model in models.items():
            model.get_input_embeddings().register_forward_pre_hook(partial(self._note, name))

    def clear(self) -> None:
        """Begin again at zero."""
        self.calls.clear()

    def _note(self, name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (ids,) = arguments
        self.calls[Call(name, torch.is_grad_enabled(), ids.shape[-1])] += ids.numel()
