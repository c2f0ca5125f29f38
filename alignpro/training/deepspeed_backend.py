"""The DeepSpeed backend: AdamW with optimizer, gradients and weights sharded over ranks by ZeRO (Rajbhandari et al., 2020)."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor, nn

from alignpro.config import DeepSpeedConfig, OptimizerConfig
from alignpro.distributed.deepspeed.compilation import compile_operators
from alignpro.distributed.deepspeed.zero_config import ZeroConfig
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.sharding.frozen import FrozenModels, OffloadedWeights, ShardedModels
from alignpro.distributed.sharding.gathered_model import GatheredModel, SamplingModel
from alignpro.errors import CheckpointError, ConfigError, TrainingError
from alignpro.models.language_model import LanguageModel
from alignpro.models.pickled_files import foreign_globals
from alignpro.policy.policy import Policy
from alignpro.policy.zero3_module import HeadPass
from alignpro.training.adamw_update import rescale_update, rescale_weight
from alignpro.training.backend import Backend
from alignpro.training.durability import PARTIAL
from alignpro.training.learning_rate_schedule import (
    learning_rate,
    learning_rate_schedule,
    skip_updates,
    sync_learning_rate,
)

logger = logging.getLogger(__name__)

PICKLED_CLASSES = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
"""What DeepSpeed's checkpoints hold beside tensors and plain data. It reads them without a restriction of its own."""
MAX_CONSECUTIVE_SKIPS = 10
"""Number of consecutive skipped updates at which the run stops; the loss scale of float16 settles in fewer."""


class DeepSpeedDistribution:
    """Ranks under the ``deepspeed`` launcher.

    Args:
        ranks: All ranks.
        zero: DeepSpeed's configuration, for the policy.
        config: The job's section ``deepspeed``, which says how the frozen models are sharded and offloaded.
    """

    def __init__(self, ranks: Ranks, zero: ZeroConfig, config: DeepSpeedConfig) -> None:
        self.ranks = ranks
        self.zero = zero
        self.can_keep_graph = zero.stage < 3  # hooks of stage 3 require each forward to be followed by its backward
        self.lockstep = zero.stage == 3  # each pass gathers weights
        self._config = config

    def frozen(self, role: Literal["target", "reward"]) -> FrozenModels:
        """Shard the models if the role's stage is 3."""
        stage = {"target": self._config.target_stage, "reward": self._config.reward_stage}[role]
        return ShardedModels(self.ranks) if stage == 3 else FrozenModels()

    def frozen_reference(self, policy: Policy) -> FrozenModels:
        """Offload the reference to host memory if configured, except the weights of the heads: the update reads these too.

        Raises:
            ConfigError: The reference is not a separate model.
        """
        if not self._config.offload_reference:
            return FrozenModels()
        on_device = {id(weight) for weight in (*policy.model.parameters(), *policy.module.head.weights())}
        reference = policy.reference
        weights = [] if reference is None else [each for each in reference.parameters() if id(each) not in on_device]
        if reference is None or not weights:
            raise ConfigError(
                "deepspeed.offload_reference: the reference is the policy without its adapter, whose weights the policy "
                "needs; leave the key out"
            )
        reference.disable_packing()
        return OffloadedWeights(weights, policy.model.device)

    def hold_once(self, models: Sequence[LanguageModel]) -> None:
        """Leave them apart: DeepSpeed moves or shards the policy's weights, and the target's may have shards of their own."""

    def sampling_model(self, model: LanguageModel) -> SamplingModel:
        """Sample from the trained model itself, or at stage 3 from a copy that is gathered for each rollout."""
        return GatheredModel(model) if self.zero.stage == 3 else SamplingModel(model)

    def backend(self, module: nn.Module, optimizer: OptimizerConfig, total_updates: int) -> tuple[nn.Module, Backend]:
        """Return DeepSpeed's engine around the module, and the backend that drives it."""
        backend = DeepSpeedBackend(module, optimizer, total_updates, self.zero, self.ranks)
        return backend.engine, backend


class DeepSpeedBackend:
    """Drives a DeepSpeed engine; the gradient of a step is the sum over all ranks and micro-batches.

    Between two steps, all ranks must make the same number of `backward` calls, and the same forward passes of the module
    in the same order: stages 2 and 3 communicate in each.

    Args:
        module: The module to train; at stage 3 all its weights are sharded, including frozen ones.
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
        self._rate = self._applied = 0.0  # of the last update: by the schedule, and with its factor
        self._trained = trained
        self._updated: list[Tensor] = []
        self._replicated = zero.replicated
        optimizer = _optimizer(trained, config, zero)
        self._schedule = learning_rate_schedule(optimizer, config, total_updates)
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=self._schedule,
            config=zero.content,
            dist_init_required=False,
        )
        self._writer = PatientWriter(config_params=self.engine._config)
        self.engine.checkpoint_engine = self._writer
        if self._replicated:
            self.engine.set_gradient_accumulation_boundary(False)
        self._models = [part for part in module.modules() if isinstance(part, LanguageModel)]
        for model in self._models:
            model.weights_updated()  # DeepSpeed has broadcast rank 0's without incrementing version counters
        if zero.stage == 3:
            for model in self._models:
                model.disable_packing()
            for part in module.modules():
                if isinstance(part, HeadPass):
                    for weight in part.weights():
                        deepspeed.zero.register_external_parameter(part, weight)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self._schedule)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to the sum over ranks."""
        # DeepSpeed takes the mean over ranks; the loss is one rank's part of a sum.
        self.engine.backward(loss * self._ranks.size, scale_wrt_gas=False)

    @property
    def can_shorten(self) -> bool:
        """Whether the state of the last update is in memory: not if it is swapped to a disk."""
        return self._zero.content["zero_optimization"].get("offload_optimizer", {}).get("device") != "nvme"

    def step(self, factor: float = 1.0) -> float:
        """Clip the norm of the summed gradient and update; if it is not finite on any rank, all skip the update.

        Args:
            factor: Multiplies the learning rate of this update.

        Returns:
            The norm before clipping; infinite if the update was skipped.

        Raises:
            TrainingError: Too many consecutive updates were skipped.
        """
        self._rate, self._applied = self.learning_rate, sync_learning_rate(self._schedule, factor)
        norm = self._clip_and_update()
        self._weights_updated()
        if math.isfinite(norm):
            self.updates += 1
            self._skipped = 0
            return norm
        self._skipped += 1
        sync_learning_rate(self._schedule)  # a skipped update does not advance the schedule
        if self._ranks.is_rank_zero:
            logger.warning("update %d skipped on all ranks: a gradient is not finite", self.updates + 1)
        if self._skipped >= MAX_CONSECUTIVE_SKIPS:
            with self._ranks.raise_together():
                raise TrainingError(
                    f"the gradient was not finite {self._skipped} times in a row after {self.updates} updates: lower "
                    "optimizer.learning_rate, check the reward's scale, or use a wider dtype; --resume continues from the "
                    "last checkpoint"
                )
        return math.inf

    def shorten(self, factor: float) -> None:
        """Replace the last update by that with another factor, each rank its shard; 0 takes it back; a collective."""
        before, after = self._applied, self._rate * factor
        if self._replicated:
            rescale_update(self._optimizer, self._updated, before, after)
        elif self._zero.stage < 3:
            base = self._optimizer.optimizer
            rescale_update(base, [shard for group in base.param_groups for shard in group["params"]], before, after)
            self._optimizer.update_lp_params()
        else:
            self._shorten_shards_of_weights(before, after)
        self._applied = after
        self._weights_updated()

    def skip(self, updates: int) -> None:
        """Advance the schedule by a number of updates that are not made."""
        skip_updates(self._schedule, updates)

    def _shorten_shards_of_weights(self, before: float, after: float) -> None:
        """Do that at stage 3, whose optimizer holds a flat tensor for each subgroup, and copies it as its own step does."""
        sharded = self._optimizer
        sharded._partition_all_parameters()  # or the whole weights that it holds would stay as they are
        for i, shard in enumerate(sharded.fp32_partitioned_groups_flat):
            settings = sharded.optimizer.param_groups[sharded.sub_group_to_group_id[i]]
            rescale_weight(shard, sharded.optimizer.state[shard], settings, before, after)
            sharded._reassign_or_swap_out_partitioned_parameters(i)
        if persistent := sharded.persistent_parameters:
            persistent[0].all_gather(persistent)

    def _weights_updated(self) -> None:
        """Tell the models, since DeepSpeed does not increment version counters."""
        for model in self._models:
            if any(weight.requires_grad for weight in model.parameters()):  # not the reference
                model.weights_updated()

    def save(self, directory: Path, name: str) -> None:
        """Write this rank's shards to the folder ``name``, without frozen weights.

        Raises:
            OSError: A file cannot be written; raised once all ranks have written theirs.
            RuntimeError: Likewise, from torch.
        """
        state = {"updates": self.updates, "skipped": self._skipped}
        self.engine.save_checkpoint(
            str(directory), tag=name, client_state=state, save_latest=False, exclude_frozen_parameters=True
        )
        self._writer.raise_error()

    def load(self, directory: Path, name: str) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: There is no checkpoint, a file could run code when DeepSpeed unpickles it, or it cannot be
                converted for this number of ranks.
        """
        with self._ranks.raise_together():  # each node has its own files
            require_plain_pickles(directory / name)
        shards = self._ranks.on_rank_zero(lambda: _count_shards(directory / name))
        # Set for each checkpoint: that of the selected step may come from another number of ranks than the newest.
        universal = self.engine._config.load_universal_checkpoint = shards not in (0, self._ranks.size)
        state = self._load_universal(directory, name) if universal else self._load(directory, name)
        sync_learning_rate(self._schedule)
        self.updates, self._skipped = int(state["updates"]), int(state["skipped"])

    def _load(self, directory: Path, name: str) -> dict[str, Any]:
        # Not strict: the checkpoint has no frozen weights.
        path, state = self.engine.load_checkpoint(str(directory), tag=name, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"checkpoint {directory}: has no DeepSpeed checkpoint {name}/")
        loaded: dict[str, Any] = state
        return loaded

    def _load_universal(self, directory: Path, name: str) -> dict[str, Any]:
        """Load a checkpoint of another number of ranks: convert it to DeepSpeed's universal format, for any number.

        A rank that fails here must not wait for the others, which may be in a collective of DeepSpeed's. What is left of the
        converted checkpoint is then removed when the run is opened again.
        """
        converted = directory.with_name(f"{PARTIAL}universal")
        self._ranks.on_rank_zero(lambda: _convert(directory / name, converted / name))
        state = self._load(converted, name)
        self._ranks.barrier()  # until all have read it
        self._ranks.on_rank_zero(lambda: shutil.rmtree(converted, ignore_errors=True))
        return state

    def _clip_and_update(self) -> float:
        """Update the weights and return the gradient norm, infinite if the update was skipped."""
        if self._replicated:
            # DeepSpeed only sums the gradients here. torch's AdamW does the rest and does not check that they are finite.
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
            gradients = [weight.grad for weight in self._trained if weight.grad is not None]
            norm = nn.utils.get_total_norm(gradients).item()
            if math.isfinite(norm):
                self._updated = [weight for weight in self._trained if weight.grad is not None]
                self.engine.step()
            else:
                self.engine.zero_grad()
            self.engine.set_gradient_accumulation_boundary(False)
            return norm if math.isfinite(norm) else math.inf
        self.engine.step()
        return math.inf if self._optimizer.overflow else float(self.engine.get_global_grad_norm())


class PatientWriter(TorchCheckpointEngine):
    """DeepSpeed's writer of checkpoints, on a rank that keeps the first failure to write until it is asked for.

    DeepSpeed ends a checkpoint by a barrier, in which the other ranks would wait for one that raises before, until the
    timeout.
    """

    def __init__(self, config_params: Any) -> None:
        super().__init__(config_params)
        self._error: OSError | RuntimeError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file."""
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch wraps the OSError
            self._error = self._error or error

    def raise_error(self) -> None:
        """Raise the first failure since the last call, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def require_plain_pickles(directory: Path) -> None:
    """Check that the pickles of a DeepSpeed checkpoint name only what DeepSpeed writes, before it reads them.

    Raises:
        CheckpointError: One names something else, or has another form.
    """
    for file in sorted(directory.rglob("*.pt")):
        try:
            names = foreign_globals(file, PICKLED_CLASSES)
        except ValueError as error:
            raise CheckpointError(f"checkpoint file {file}: {error}; restore it, or start a new run") from error
        if names:
            raise CheckpointError(
                f"checkpoint file {file}: could run code when it is read (it names {', '.join(names[:3])}, which DeepSpeed "
                "does not write); restore it, or start a new run"
            )


def _count_shards(directory: Path) -> int:
    """Count the ranks over which a checkpoint is sharded; 0 if every rank had the whole state."""
    return len(list(directory.glob("*zero_pp_rank_*_optim_states.pt")))


def _convert(source: Path, destination: Path) -> None:
    """Convert a ZeRO checkpoint to the universal format with DeepSpeed's own program."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(destination)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(destination, ignore_errors=True)  # frees space if the disk is full
        raise CheckpointError(
            f"checkpoint {source}: cannot be converted for another number of ranks: {done.stderr.strip()[-2000:]}; resume on "
            "the number of ranks that wrote it"
        )


def _optimizer(trained: list[nn.Parameter], config: OptimizerConfig, zero: ZeroConfig) -> torch.optim.Optimizer:
    """Create AdamW: DeepSpeed's CPU implementation if the optimizer is offloaded, otherwise that of torch."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if not zero.offloads_optimizer:
        return torch.optim.AdamW(trained, **settings, fused=True)  # one pass over a weight and its state
    compile_operators(offload=True)  # does nothing where the job has begun with it
    optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(trained, adamw_mode=True, **settings)
    return optimizer
