"""The weights of a policy and of its reference as one module, whose forward is every pass over them.

Sharded weights (ZeRO-3) are whole only inside the forward of a module that is known to use them: hooks gather them
before it, and again before its part of the backward. The fused head reads the weights of output layers that are never
called themselves, so it has a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from alignpro.language_model import LanguageModel

Outputs = TypeVar("Outputs")


class HeadPass(nn.Module):
    """Work on output layers that it does not own: ``head(states, work)`` is ``work(states)``, and hooks may surround it.

    The states are an argument, and what comes out is a tensor or a tuple of tensors: hooks find the beginning and the
    end of its backward by them.

    Args:
        layers: Whose parameters the work reads.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self._layers = tuple(layers)  # in a tuple they are not its children: each weight has one owner

    def weights(self) -> list[nn.Parameter]:
        """The parameters that its work reads, each once."""
        found = {id(weight): weight for layer in self._layers for weight in layer.parameters()}
        return list(found.values())

    def forward(self, states: Tensor, work: Callable[[Tensor], Outputs]) -> Outputs:
        """Do the work on states, (N, D)."""
        return work(states)


class PolicyModule(nn.Module):
    """A policy and its reference.

    Args:
        model: What is trained.
        reference: The frozen reference; None where it is the model without its adapter.
    """

    def __init__(self, model: LanguageModel, reference: LanguageModel | None) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.reference = reference
        models = [model] if reference is None else [model, reference]
        self.head = HeadPass([each.causal.get_output_embeddings() for each in models])

    def forward(self, work: Callable[[], Outputs]) -> Outputs:
        """Do some work on the weights: what is returned is a tensor or a tuple of tensors."""
        return work()
