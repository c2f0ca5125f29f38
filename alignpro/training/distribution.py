"""How a job is spread over processes: what the trainer needs to know of it, and nothing else.

One process trains with plain torch. Under the ``deepspeed`` launcher each rank trains on its share of the prompts, and
DeepSpeed shards optimizer, gradients and weights as its stage says. Same loop, same numbers.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import nn

from alignpro.config import OptimizerConfig
from alignpro.distributed.frozen import FrozenModels
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sampling import SamplingModel
from alignpro.language_model import LanguageModel
from alignpro.policy import Policy
from alignpro.training.backend import Backend, TorchBackend


class Distribution(Protocol):
    """Makes what depends on how many processes there are."""

    ranks: Ranks
    graphs_last: bool
    """Whether the graph of a pass may wait while other passes run, and its backward be after them."""
    equal_passes: bool
    """Whether all ranks must make as many passes over the weights, whatever their sequences are."""

    def frozen(self, role: Literal["target", "reward"]) -> FrozenModels:
        """What loads the frozen models of a role, and has them ready when they are run."""

    def frozen_reference(self, policy: Policy) -> FrozenModels:
        """What has the policy's reference ready; asked for before `backend`."""

    def sampling_model(self, model: LanguageModel) -> SamplingModel:
        """What the engine is to sample from; asked for before `backend`, which may shard the model."""

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        """What is to be called in place of a module from now on, and what trains its weights."""


class SingleProcess:
    """Plain torch."""

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.graphs_last = True
        self.equal_passes = False

    def frozen(self, role: Literal["target", "reward"]) -> FrozenModels:
        """Whole on their device."""
        return FrozenModels()

    def frozen_reference(self, policy: Policy) -> FrozenModels:
        """It always is."""
        return FrozenModels()

    def sampling_model(self, model: LanguageModel) -> SamplingModel:
        """The model itself."""
        return SamplingModel(model)

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        """The module itself, and AdamW."""
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        return module, TorchBackend(trained, optimizer, total_updates)
