"""The critic of PPO: a copy of the policy's decoder with a scalar output, V(s_t) for the state before each action."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from alignpro import objectives
from alignpro.distributed.ranks import Ranks
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.training.backend import Backend
from alignpro.training.metrics import Metrics


class ValueModel(nn.Module):
    """Starts from the policy's current weights, with a scalar output layer of zeros: all values are zero at first.

    Args:
        policy: The policy whose decoder is copied, adapter included; all weights of the copy are trained.
    """

    def __init__(self, policy: LanguageModel) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(policy).requires_grad_(True).eval()
        self.decoder.causal.get_output_embeddings().requires_grad_(_is_tied(self.decoder))
        weight = policy.head.weight
        self.output = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=policy.states_dtype)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Compute V, (B, T), zero outside the mask; float32, or float64 for a float64 policy."""
        states = self.decoder.action_states(batch)
        values = self.output(states.to(self.output.weight.dtype)).squeeze(-1)  # which DeepSpeed may have made narrower
        return batch.scatter(values if values.dtype == torch.float64 else values.float())


class Critic:
    """A value model and the backend that trains it.

    Args:
        model: A `ValueModel`, or a backend's wrapper around one.
        backend: Trains the model.
        ranks: All ranks.
    """

    def __init__(self, model: nn.Module, backend: Backend, ranks: Ranks) -> None:
        self.model = model
        self.backend = backend
        self._ranks = ranks
        self._loss = 0.0

    @torch.no_grad()
    def values(self, batches: Iterable[SequenceBatch]) -> list[Tensor]:
        """Compute V of every action without gradients, (B, T) for each batch."""
        return [self.model(batch) for batch in batches]

    def backward(self, batch: SequenceBatch, targets: Tensor, scale: float) -> None:
        """Add the gradients of scale · Σ ½ (V − target)²."""
        loss = objectives.value_loss(self.model(batch), targets, batch.mask, scale)
        self._loss += loss.item()
        self.backend.backward(loss)

    def step(self) -> Metrics:
        """Make one optimizer step with the gradients that `backward` added on all ranks."""
        loss, self._loss = self._loss, 0.0
        norm = self.backend.step()
        return {"value_loss": self._ranks.sum(loss), "value_gradient_norm": norm}


def _is_tied(model: LanguageModel) -> bool:
    return model.causal.get_input_embeddings().weight is model.causal.get_output_embeddings().weight
