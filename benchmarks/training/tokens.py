"""Counts of the tokens that models compute, taken at their embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Call(NamedTuple):
    """A kind of forward pass, counted separately."""

    model: str
    grad: bool
    """Whether gradients were recorded."""
    width: int
    """Tokens of each sequence."""


class TokenCounter:
    """Counts the tokens that go through the embeddings of models, including padding.

    A replayed CUDA graph runs no hook, so passes that may be replayed are to be left out and counted otherwise.

    Args:
        models: Name → model.
        counted: Whether to count a pass that runs now; by default all are.
        name_now: Given a model's name, returns that under which its tokens count at present: the policy with its adapter
            switched off may be the reference.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        counted: Callable[[], bool] = lambda: True,
        name_now: Callable[[str], str] = lambda name: name,
    ) -> None:
        self._counted, self._name_now = counted, name_now
        self.calls: Counter[Call] = Counter()
        """Number of tokens per kind of forward pass."""
        for name, model in models.items():
            model.get_input_embeddings().register_forward_pre_hook(partial(self._note, name))

    def clear(self) -> None:
        """Reset the counts to zero."""
        self.calls.clear()

    def _note(self, name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        (ids,) = arguments
        if self._counted():
            self.calls[Call(self._name_now(name), torch.is_grad_enabled(), ids.shape[-1])] += ids.numel()
