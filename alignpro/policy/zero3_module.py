"""A policy and its reference as one module; every pass over their weights is a forward of this module.

Sharded weights (ZeRO-3) are whole only inside the forward of a module that is known to use them: hooks gather them
before it, and again before its backward. The fused head reads the weights of output layers whose own forward is never
called, so it has a separate module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from alignpro.models.language_model import LanguageModel

Outputs = TypeVar("Outputs")


class HeadPass(nn.Module):
    """Runs a function of output layers that it does not own: ``head(states, function)`` is ``function(states)`` amid hooks.

    The states are an argument and the result is a tensor or a tuple of tensors, because hooks locate the beginning and
    the end of the module's backward by its inputs and outputs.

    Args:
        layers: The layers whose parameters the function reads.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self._layers = tuple(layers)  # a tuple does not register them as children: each weight has one owner

    def weights(self) -> list[nn.Parameter]:
        """Return the parameters that the function reads, each once."""
        found = {id(weight): weight for layer in self._layers for weight in layer.parameters()}
        return list(found.values())

    def forward(self, states: Tensor, function: Callable[[Tensor], Outputs]) -> Outputs:
        """Run the function on states, (N, D)."""
        return function(states)


class PolicyModule(nn.Module):
    """A policy and its reference.

    Args:
        model: The trained model.
        reference: The frozen reference; None if it is the model without its adapter.
    """

    def __init__(self, model: LanguageModel, reference: LanguageModel | None) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.reference = reference
        models = [model] if reference is None else [model, reference]
        self.head = HeadPass([each.causal.get_output_embeddings() for each in models])

    def forward(self, function: Callable[[], Outputs]) -> Outputs:
        """Run a function that uses the weights; it returns a tensor or a tuple of tensors."""
        return function()
