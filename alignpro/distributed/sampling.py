"""Whole weights for sampling, where training has them in shards: gathered once a rollout, never once a token.

The engine runs a copy of the model's structure that no hook of DeepSpeed is on. Its weights are there for as long as
`whole` lasts; the shards they are gathered from stay where they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alignpro.language_model import LanguageModel

GATHERED_BYTES = 512 << 20
"""What is gathered at once, beside the copy itself."""


class SamplingModel:
    """The model that the engine samples from: the trained one itself, whose weights are always whole.

    Args:
        model: What is trained.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @contextmanager
    def whole(self) -> Iterator[LanguageModel]:
        """The model with all its weights: a collective, where they are in shards."""
        yield self.model


class GatheredModel(SamplingModel):
    """A copy whose weights are gathered; make it before the model is sharded.

    Args:
        model: What is trained.
        gathered_bytes: The budget of one gathering.
    """

    def __init__(self, model: LanguageModel, gathered_bytes: int = GATHERED_BYTES) -> None:
        empty = {id(w): nn.Parameter(w.new_empty(0), requires_grad=False) for w in model.parameters()}
        super().__init__(copy.deepcopy(model, {id(model.tokenizer): model.tokenizer, **empty}).eval())
        self._pairs = [(weight, empty[id(weight)]) for weight in model.parameters()]
        self._gathered_bytes = gathered_bytes

    @contextmanager
    def whole(self) -> Iterator[LanguageModel]:
        """The copy with all weights as they are now."""
        import deepspeed

        try:
            for chunk in self._chunks():
                with torch.no_grad(), deepspeed.zero.GatheredParameters([source for source, _ in chunk]):
                    for source, target in chunk:
                        target.data = source.detach().clone()
            self.model.weights_changed()
            yield self.model
        finally:
            self.model.weights_changed()
            for _, target in self._pairs:
                target.data = target.data.new_empty(0)

    def _chunks(self) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
        """The pairs in lots that the budget allows."""
        chunk: list[tuple[nn.Parameter, nn.Parameter]] = []
        size = 0
        for source, target in self._pairs:
            needed = source.ds_numel * source.element_size()  # type: ignore[attr-defined]
            if chunk and size + needed > self._gathered_bytes:
                yield chunk
                chunk, size = [], 0
            chunk.append((source, target))
            size += needed
        if chunk:
            yield chunk
