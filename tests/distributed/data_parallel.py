"""Data-parallel training of a tiny world on any group of ranks: each pass and each update is a collective, as at ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_world import END, LENGTH, World
from torch import Tensor, nn

from alignpro.config import ObjectiveConfig, OptimizerConfig, RunConfig
from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.engine import Chain, Engine, SamplingParams
from alignpro.training.backend import Backend, TorchBackend
from alignpro.training.distribution import SingleProcess
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.rollouts import SamplingAhead

BACKEND = "backend of "
"""What the phase of a collective of the backend begins with."""


class DrawnWorld(World):
    """A world whose samples are a function of the seed alone, and need no engine."""

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        return [[self.chains[(seed % 1009 + 7 * k) % len(self.chains)] for k in range(params.n)] for seed in seeds]


class DataParallel(SingleProcess):
    """Ranks that hold all weights and sum their gradients.

    Args:
        ranks: All ranks.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.can_keep_graph = False
        self.lockstep = True

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        return GatheredModule(module, self.ranks), SummingBackend(trained, optimizer, total_updates, self.ranks)


class GatheredModule(nn.Module):
    """A module each of whose passes takes all ranks."""

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.module, self.ranks = module, ranks

    def forward(self, *arguments: Any) -> Any:
        with of_the_backend(self.ranks):
            dist.all_reduce(torch.zeros(3), group=self.ranks.group)
        return self.module(*arguments)


class SummingBackend(TorchBackend):
    """AdamW on the sum of all ranks' gradients."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], config: OptimizerConfig, total_updates: int, ranks: Ranks
    ) -> None:
        super().__init__(weights, config, total_updates)
        self.ranks = ranks

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        with of_the_backend(self.ranks):
            dist.all_reduce(torch.zeros(2), group=self.ranks.group)

    def step(self, factor: float = 1.0) -> float:
        with of_the_backend(self.ranks):
            for weight in self.weights.values():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad, group=self.ranks.group)
        return super().step(factor)

    def save(self, directory: Path, name: str) -> None:
        super().save(directory, f"{name}_{self.ranks.rank}")


@contextmanager
def of_the_backend(ranks: Ranks) -> Iterator[None]:
    """Name what is issued inside as the backend's."""
    before, ranks.phase = ranks.phase, BACKEND + ranks.phase
    try:
        yield
    finally:
        ranks.phase = before


def training(
    world: World,
    ranks: Ranks,
    prompts: int,
    objective: dict[str, Any],
    *,
    out: Path,
    micro_batch_size: int = 2,
    ahead: SamplingAhead | None = None,
) -> RLTrainer:
    """Return a trainer of a world with two samples for each of some prompts in each step."""
    return RLTrainer(
        world.policy,
        world,
        Engine({"policy": world.policy.model}, max_batch=64),
        world.prompts,
        world.prompts,
        sampling=SamplingParams(n=2, max_tokens=LENGTH, temperature=world.policy.temperature, stop_token_ids=(END,)),
        prompts_per_step=prompts,
        objective=ObjectiveConfig.model_validate(objective),
        run=RunConfig(out=out, steps=4, sample_every=1000, tensorboard=False),
        optimizer=OptimizerConfig(learning_rate=0.01, micro_batch_size=micro_batch_size),
        distribution=SingleProcess() if ranks.group is None else DataParallel(ranks),
        ahead=ahead,
    )
