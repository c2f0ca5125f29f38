"""The DeepSpeed backend: AdamW with optimizer, gradients and weights sharded over ranks by ZeRO (Rajbhandari et al., 2020)."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from torch import Tensor, nn

from alignpro.config import DeepSpeedConfig, OptimizerConfig
from alignpro.distributed.frozen import FrozenModels, OffloadedWeights, ShardedModels
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sampling import GatheredModel, SamplingModel
from alignpro.distributed.zero_config import ZeroConfig
from alignpro.errors import CheckpointError, ConfigError, TrainingError
from alignpro.language_model import LanguageModel
from alignpro.policy import Policy
from alignpro.policy_module import HeadPass
from alignpro.training.backend import Backend, follow, learning_rate_factor
from alignpro.training.durability import PARTIAL

logger = logging.getLogger(__name__)

MOST_SKIPPED = 10
"""Updates in a row that may be skipped before the run gives up; the loss scale of float16 settles in fewer."""


class DeepSpeedDistribution:
    """Ranks under the ``deepspeed`` launcher.

    Args:
        ranks: All of them.
        zero: What of the policy is sharded.
        config: What of the frozen models is.
    """

    def __init__(self, ranks: Ranks, zero: ZeroConfig, config: DeepSpeedConfig) -> None:
        self.ranks = ranks
        self.zero = zero
        self.graphs_last = zero.stage < 3  # from there on hooks want each forward followed by its backward
        self.equal_passes = zero.stage == 3  # each gathers weights
        self._config = config

    def frozen(self, role: Literal["target", "reward"]) -> FrozenModels:
        """In shards where the role's stage says so."""
        stage = {"target": self._config.target_stage, "reward": self._config.reward_stage}[role]
        return ShardedModels(self.ranks, self._config.gathered_bytes) if stage == 3 else FrozenModels()

    def frozen_reference(self, policy: Policy) -> FrozenModels:
        """In the host's memory where that is asked for; what the heads read stays, since the update reads it too.

        Raises:
            ConfigError: The reference is no model of its own.
        """
        if not self._config.offload_reference:
            return FrozenModels()
        kept = {id(weight) for weight in (*policy.model.parameters(), *policy.module.head.weights())}
        weights = [] if policy.reference is None else list(policy.reference.parameters())
        weights = [weight for weight in weights if id(weight) not in kept]
        if not weights:
            raise ConfigError(
                "deepspeed.offload_reference: the reference is the policy without its adapter, whose weights the policy "
                "needs; leave it out"
            )
        assert policy.reference is not None  # whose weights they are
        policy.reference.keep_one_layout()
        return OffloadedWeights(weights, policy.model.device)

    def sampling_model(self, model: LanguageModel) -> SamplingModel:
        """The model itself, but at stage 3 a copy that is gathered for each rollout."""
        return GatheredModel(model) if self.zero.stage == 3 else SamplingModel(model)

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        """DeepSpeed's engine around the module, and the backend that drives it."""
        backend = DeepSpeedBackend(module, optimizer, total_updates, self.zero, self.ranks)
        return backend.engine, backend


class DeepSpeedBackend:
    """Drives a DeepSpeed engine; the gradient of a step is the sum over all ranks and micro-batches.

    Ranks must call `backward` equally often between steps, and the forwards of the module equally often and in the same
    order: stages 2 and 3 communicate in each.

    Args:
        module: What is trained, and what hangs on it: at stage 3 all its weights are sharded, frozen ones too.
        config: Learning rate, schedule and clipping.
        total_updates: Optimizer steps in the whole run, for the schedule.
        zero: DeepSpeed's configuration.
        ranks: All ranks.

    Raises:
        TrainingError: There is nothing to train.
    """

    def __init__(
        self, module: nn.Module, config: OptimizerConfig, total_updates: int, zero: ZeroConfig, ranks: Ranks
    ) -> None:
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        if not trained:
            raise TrainingError("no weight of the model requires a gradient: check policy.adapter")
        self.updates = 0
        self._config, self._zero, self._ranks = config, zero, ranks
        self._skipped = 0
        self._trained = trained
        self._replicated = zero.replicated
        optimizer = _optimizer(trained, config, zero)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: learning_rate_factor(update, total_updates, config)
        )
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=self._schedule,
            config=zero.content,
            dist_init_required=False,
        )
        if self._replicated:
            self.engine.set_gradient_accumulation_boundary(False)
        self._models = [part for part in module.modules() if isinstance(part, LanguageModel)]
        for model in self._models:
            model.weights_changed()  # all have rank 0's now, written past what PyTorch counts as a change
        if zero.stage == 3:
            for model in self._models:
                model.keep_one_layout()
            for part in module.modules():
                if isinstance(part, HeadPass):
                    for weight in part.weights():
                        deepspeed.zero.register_external_parameter(part, weight)

    @property
    def learning_rate(self) -> float:
        """The rate that the next update takes."""
        return float(self._schedule.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the sum over ranks."""
        # DeepSpeed takes the mean over ranks; the loss is one rank's part of a sum.
        self.engine.backward(loss * self._ranks.size, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip the norm of the summed gradient and update; where it is not finite on any rank, none is updated.

        Returns:
            The norm before clipping; infinite where the update was skipped.

        Raises:
            TrainingError: Too many updates in a row were skipped.
        """
        norm = self._step()
        for model in self._models:
            if any(weight.requires_grad for weight in model.parameters()):  # the reference's have not
                model.weights_changed()  # DeepSpeed writes them past what PyTorch counts as a change
        if math.isfinite(norm):
            self.updates += 1
            self._skipped = 0
            return norm
        self._skipped += 1
        if self._ranks.first:
            logger.warning("update %d skipped on all ranks: a gradient is not finite", self.updates + 1)
        if self._skipped >= MOST_SKIPPED:
            with self._ranks.together():
                raise TrainingError(
                    f"the gradient was not finite {self._skipped} times in a row after {self.updates} updates: lower "
                    "optimizer.learning_rate, check the reward's scale, or use a wider dtype; --resume continues from the "
                    "last checkpoint"
                )
        return math.inf

    def save(self, directory: Path, name: str) -> None:
        """Each rank writes its shards to the folder ``name``; frozen weights are not among them."""
        state = {"updates": self.updates, "skipped": self._skipped}
        self.engine.save_checkpoint(
            str(directory), tag=name, client_state=state, save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, directory: Path, name: str) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: It is not there, or of another model.
        """
        if self.engine.load_universal_checkpoint():
            with self._universal(directory, name) as converted:
                state = self._load(converted, name)
        else:
            state = self._load(directory, name)
        follow(self._schedule)
        self.updates, self._skipped = int(state["updates"]), int(state["skipped"])

    def _load(self, directory: Path, name: str) -> dict[str, Any]:
        # Not strict: frozen weights are not in it.
        path, state = self.engine.load_checkpoint(str(directory), tag=name, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"checkpoint {directory}: has no {name}/ of DeepSpeed")
        loaded: dict[str, Any] = state
        return loaded

    @contextmanager
    def _universal(self, directory: Path, name: str) -> Iterator[Path]:
        """The checkpoint in DeepSpeed's universal form, which any number of ranks can load, for as long as it is needed."""
        converted = directory.with_name(f"{PARTIAL}universal")
        try:
            self._ranks.on_first(lambda: _convert(directory / name, converted / name))
            yield converted
        finally:
            self._ranks.on_first(lambda: shutil.rmtree(converted, ignore_errors=True))

    def _step(self) -> float:
        """An update, and the norm; infinite where nothing was updated."""
        if self._replicated:
            # DeepSpeed sums the gradients here and leaves the rest to torch's AdamW, which does not look at them.
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
            gradients = [weight.grad for weight in self._trained if weight.grad is not None]
            norm = nn.utils.get_total_norm(gradients).item()
            if math.isfinite(norm):
                self.engine.step()
            else:
                self.engine.zero_grad()
            self.engine.set_gradient_accumulation_boundary(False)
            return norm if math.isfinite(norm) else math.inf
        self.engine.step()
        return math.inf if self._optimizer.overflow else float(self.engine.get_global_grad_norm())


def _convert(source: Path, destination: Path) -> None:
    """Write a checkpoint of ZeRO in its universal form, by DeepSpeed's own program."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(destination)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(
            f"checkpoint {source}: cannot be converted for another number of ranks: {done.stderr.strip()[-2000:]}; resume on "
            "as many ranks as it was made on"
        )


def _optimizer(trained: list[nn.Parameter], config: OptimizerConfig, zero: ZeroConfig) -> torch.optim.Optimizer:
    """AdamW, that of DeepSpeed for the CPU where the optimizer is offloaded to it."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if not zero.offloads_optimizer:
        return torch.optim.AdamW(trained, **settings, fused=True)  # one pass over a weight and its state
    optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(trained, adamw_mode=True, **settings)
    return optimizer
