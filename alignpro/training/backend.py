"""Optimizer backends, which compute gradients and update weights: the interface, and the one in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignpro.config import OptimizerConfig
from alignpro.errors import ConfigError, TrainingError
from alignpro.training.adamw_update import rescale_update
from alignpro.training.checkpoint import save_torch
from alignpro.training.learning_rate_schedule import (
    learning_rate,
    learning_rate_schedule,
    skip_updates,
    sync_learning_rate,
)
from alignpro.training.resume import check_weights


class Backend(Protocol):
    """Accumulates the gradients of a set of weights and updates the weights."""

    updates: int
    """Optimizer steps made so far."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those that the next `step` uses."""

    @property
    def can_shorten(self) -> bool:
        """Whether `shorten` is possible."""

    def step(self, factor: float = 1.0) -> float:
        """Clip gradients, update weights, advance the schedule, clear gradients; returns the norm before clipping.

        Args:
            factor: Multiplies the learning rate of this update.
        """

    def shorten(self, factor: float) -> None:
        """Replace the last update by that which `step` would have made with another factor; 0 takes it back."""

    def skip(self, updates: int) -> None:
        """Advance the schedule by a number of updates that are not made."""

    def save(self, directory: Path, name: str) -> None:
        """Write weights and optimizer state to files whose names start with ``name``."""

    def load(self, directory: Path, name: str) -> None:
        """Read what `save` wrote."""


class TorchBackend:
    """AdamW in a single process.

    Half-precision weights are updated through a float32 master copy, and their gradients are summed in float32: bfloat16
    has 8 bits of precision, so a relative update of 1e-3 would be rounded away.

    Args:
        weights: Name → parameter to train.
        config: Learning rate, schedule and clipping.
        total_updates: Optimizer steps in the whole run, for the schedule.

    Raises:
        TrainingError: There is nothing to train.
        ConfigError: A weight is float16, in which small gradients underflow: only DeepSpeed scales the loss.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], config: OptimizerConfig, total_updates: int) -> None:
        if not weights:
            raise TrainingError("no weight of the model requires a gradient: check policy.adapter")
        if any(weight.dtype == torch.float16 for weight in weights.values()):
            raise ConfigError(
                "dtype=float16 cannot be trained in a single process, which does not scale the loss, so that small "
                "gradients would underflow: take bfloat16 or float32, or start with the deepspeed launcher"
            )
        self.weights = dict(weights)
        self.updates = 0
        self._config = config
        self._updated: list[Tensor] = []
        self._rate = self._applied = 0.0  # of the last update: by the schedule, and with its factor
        self._master: dict[str, Tensor] = {
            name: weight.detach().float().clone() if weight.dtype in (torch.bfloat16, torch.float16) else weight
            for name, weight in self.weights.items()
        }
        self._optimizer = torch.optim.AdamW(
            self._master.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,  # one pass over a weight and its state, on every device
        )
        self._schedule = learning_rate_schedule(self._optimizer, config, total_updates)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss.

        Raises:
            TrainingError: The loss is NaN or infinite; the weights are unchanged.
        """
        if not torch.isfinite(loss):
            self._clear()
            raise TrainingError(
                f"the loss is {loss.item()} after {self.updates} updates: lower optimizer.learning_rate, check the "
                "reward's scale, or use a wider dtype; --resume continues from the last checkpoint"
            )
        loss.backward()
        for name, weight in self.weights.items():
            master = self._master[name]
            if master is not weight and weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    @property
    def can_shorten(self) -> bool:
        """True: AdamW's state says what the last update was."""
        return True

    def step(self, factor: float = 1.0) -> float:
        """Clip the gradient norm and update the weights, at the scheduled learning rate times a factor.

        Raises:
            TrainingError: The gradient norm is NaN or infinite; the weights are unchanged.
        """
        norm = nn.utils.clip_grad_norm_(self._master.values(), self._config.max_grad_norm).item()
        if not math.isfinite(norm):
            self._clear()
            raise TrainingError(
                f"the gradient's norm is {norm} after {self.updates} updates: lower optimizer.learning_rate, or use a "
                "wider dtype; --resume continues from the last checkpoint"
            )
        self.updates += 1  # before the weights change: as long as the count is the same, so are the weights
        self._updated = [weight for weight in self._master.values() if weight.grad is not None]
        self._rate, self._applied = self.learning_rate, sync_learning_rate(self._schedule, factor)
        self._optimizer.step()
        # Fused kernels do not increment version counters, by which a copy in another layout detects that it is stale.
        torch.autograd.graph.increment_version(list(self._master.values()))
        self._schedule.step()
        self._copy_from_master()
        self._clear()
        return norm

    def shorten(self, factor: float) -> None:
        """Replace the last update by that with another factor; 0 takes it back."""
        rescale_update(self._optimizer, self._updated, self._applied, self._rate * factor)
        self._applied = self._rate * factor
        self._copy_from_master()

    def skip(self, updates: int) -> None:
        """Advance the schedule by a number of updates that are not made."""
        skip_updates(self._schedule, updates)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self._schedule)

    def save(self, directory: Path, name: str) -> None:
        """Write ``{name}.safetensors`` (float32 master copies if there are any) and ``{name}_optimizer.pt``."""
        save_file({key: w.detach().contiguous() for key, w in self._master.items()}, directory / f"{name}.safetensors")
        state = {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "updates": self.updates,
        }
        save_torch(state, directory / f"{name}_optimizer.pt")

    def load(self, directory: Path, name: str) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The checkpoint belongs to a model with other weights.
        """
        saved = load_file(directory / f"{name}.safetensors")
        check_weights(directory, saved, self._master)
        with torch.no_grad():
            for key, weight in self._master.items():
                weight.copy_(saved[key])
        self._copy_from_master()
        state = torch.load(directory / f"{name}_optimizer.pt", weights_only=True, map_location="cpu")
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        sync_learning_rate(self._schedule)
        self.updates = state["updates"]

    @torch.no_grad()
    def _copy_from_master(self) -> None:
        for name, weight in self.weights.items():
            if self._master[name] is not weight:
                weight.copy_(self._master[name])

    def _clear(self) -> None:
        for name, weight in self.weights.items():
            weight.grad = None
            self._master[name].grad = None
