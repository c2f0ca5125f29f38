"""How a job is distributed over processes: the interface that the trainer uses, and the case of one process.

One process trains with plain PyTorch. Under the ``deepspeed`` launcher each rank trains on its share of the prompts, and
DeepSpeed shards optimizer states, gradients and weights according to the ZeRO stage. The loop and its results are the
same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

from torch import nn

from alignpro.config import OptimizerConfig
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sharding.frozen import FrozenModels
from alignpro.distributed.sharding.gathered_model import SamplingModel
from alignpro.models.freed_memory import return_freed_memory
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixed_model import share_equal_weights
from alignpro.policy.policy import Policy
from alignpro.training.backend import Backend, TorchBackend

logger = logging.getLogger(__name__)


class Distribution(Protocol):
    """Creates the objects that depend on the number of processes."""

    ranks: Ranks
    can_keep_graph: bool
    """Whether the autograd graph of a forward pass may be kept for a backward pass after other forward passes."""
    lockstep: bool
    """Whether all ranks must make the same number of passes over the weights, whatever their sequences are."""

    def frozen(self, role: Literal["target", "reward"]) -> FrozenModels:
        """Create the object that loads the frozen models of a role and makes them ready to run."""

    def frozen_reference(self, policy: Policy) -> FrozenModels:
        """Create the object that makes the policy's reference ready to run; call it before `backend`."""

    def hold_once(self, models: Sequence[LanguageModel]) -> None:
        """Let models share frozen weights that are equal, if each of them is whole on its device."""

    def sampling_model(self, model: LanguageModel) -> SamplingModel:
        """Create the model that the engine samples from; call it before `backend`, which may shard the trained one."""

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        """Return the module to call in place of the given one from now on, and the backend that trains its weights."""


class SingleProcess:
    """Training in one process with plain PyTorch."""

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.can_keep_graph = True
        self.lockstep = False

    def frozen(self, role: Literal["target", "reward"]) -> FrozenModels:
        """Keep the models whole on their device."""
        return FrozenModels()

    def frozen_reference(self, policy: Policy) -> FrozenModels:
        """Keep the reference on its device, always ready."""
        return FrozenModels()

    def hold_once(self, models: Sequence[LanguageModel]) -> None:
        """Let them share such weights."""
        if saved := share_equal_weights(models):
            names = " and ".join(dict.fromkeys(model.name for model in models))
            return_freed_memory()
            logger.info("%d MiB of frozen weights that are equal are held once: %s", saved >> 20, names)

    def sampling_model(self, model: LanguageModel) -> SamplingModel:
        """Sample from the trained model itself."""
        return SamplingModel(model)

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        """Return the module itself, and a backend with AdamW."""
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        return module, TorchBackend(trained, optimizer, total_updates)
