"""Whole weights for sampling when training shards them: gathered once per rollout, never once per token.

The engine runs a copy of the model's structure without DeepSpeed's hooks. Its weights exist only inside the context
`gathered`; the shards from which they are gathered stay in place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alignpro.distributed.sharding.partition import buckets
from alignpro.models.language_model import LanguageModel

GATHERED_BYTES = 512 << 20
"""Maximum bytes that one collective gathers."""


class SamplingModel:
    """The model that the engine samples from: the trained model itself, whose weights are always whole.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @contextmanager
    def gathered(self) -> Iterator[LanguageModel]:
        """Yield the model with whole weights; a collective if they are sharded."""
        yield self.model


class GatheredModel(SamplingModel):
    """A copy of the model whose weights are gathered for sampling; create it before the model is sharded.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: LanguageModel) -> None:
        empty = {id(w): nn.Parameter(w.new_empty(0), requires_grad=False) for w in model.parameters()}
        super().__init__(copy.deepcopy(model, {id(model.tokenizer): model.tokenizer, **empty}).eval())
        self._pairs = [(weight, empty[id(weight)]) for weight in model.parameters()]

    @contextmanager
    def gathered(self) -> Iterator[LanguageModel]:
        """Yield the copy with the model's current weights."""
        import deepspeed

        try:
            for bucket in buckets(self._pairs, _whole_bytes, GATHERED_BYTES):
                with torch.no_grad(), deepspeed.zero.GatheredParameters([source for source, _ in bucket]):
                    for source, target in bucket:
                        target.data = source.detach().clone()
            self.model.weights_updated()
            yield self.model
        finally:
            self.model.weights_updated()
            for _, target in self._pairs:
                target.data = target.data.new_empty(0)


def _whole_bytes(pair: tuple[nn.Parameter, nn.Parameter]) -> int:
    """Bytes of a weight that DeepSpeed has sharded and its empty copy, once it is gathered."""
    source: nn.Parameter = pair[0]
    return int(source.ds_numel * source.element_size())  # type: ignore[attr-defined]
