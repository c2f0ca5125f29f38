"""Memory per rank for each DeepSpeed set-up, from the configuration alone: `alignpro plan`.

Only the models' config.json files are loaded. The estimate counts tensors at the two peaks of a step, the rollout and the
update. It excludes fragmentation in the allocator and the libraries' own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification

from alignpro.config import ModelConfig, ModelRewardConfig, RLHFConfig, TrainConfig
from alignpro.distributed.deepspeed.zero_config import read_zero_config
from alignpro.distributed.sharding.gathered_model import GATHERED_BYTES
from alignpro.models.cpu.packed_linear import MAX_PACKED_BYTES
from alignpro.models.loading import DTYPES
from alignpro.planning.frozen_memory import frozen_memory
from alignpro.planning.model_size import ModelSize, build_empty, measure, trained_weights
from alignpro.planning.zero_memory import TrainingMemory, one_process, sharded

GIB = float(1 << 30)
ONE_PROCESS = "one"
"""The set-up without DeepSpeed: plain torch in a single process."""
SETUPS = ("z0", "z1", "z2", "z3", "z2_offload", "z3_offload")
"""The DeepSpeed set-ups of launch/zero/."""


@dataclass(frozen=True)
class Need:
    """Memory of one rank, in bytes."""

    training: TrainingMemory
    frozen: float
    """Target and reward models."""
    sampling_copy: float
    """The policy's full weights, gathered for the rollout at stage 3."""
    gathered_frozen: float
    """The target's gathered weights, if it has a ZeRO stage of its own."""
    gathered: float
    """Weights being gathered at a time for these two, before sampling begins."""
    cache: float
    """Keys and values of all sequences that run at once, each at its maximum length."""
    kept_cache: float
    """The part of ``cache`` that stays during the update: the frozen target's; on a CPU all of it."""
    sampling_pass: float
    """Activations of the largest forward pass of a rollout."""
    activations: float
    """Activations of a micro-batch, and what all samples of the step keep for the update."""
    head: float
    """The output layer's gradient in float32 and in the weights' dtype; both exist before the backward pass begins."""
    layouts: tuple[float, float]
    """Second layouts of weights on a CPU: of the policy, for the rollout, and of frozen models."""
    several_passes: bool
    """Whether a step has more than one micro-batch."""

    @property
    def rollout(self) -> float:
        """Bytes at the peak of the rollout."""
        kept = self.training.gradients if self.training.gradients_are_there == "always" else 0.0
        own, frozen = self.layouts
        sampling = max(self.gathered + self.kept_cache, self.cache + own + self.sampling_pass)
        return self._always + kept + self.sampling_copy + self.gathered_frozen + frozen + sampling

    @property
    def update(self) -> float:
        """Bytes at the peak of the update: when a backward pass begins, when the last one ends, or in the optimizer step."""
        training = self.training
        early = self.several_passes or training.gradients_are_there != "as they come"
        waiting = training.gradients if early else 0.0
        begins = self.activations + self.head + waiting + training.backward
        ends = training.gradients + training.backward
        own, frozen = self.layouts
        laid_out = frozen + (0.0 if self.sampling_copy else own)  # a sampling copy's layout was freed with it
        most = max(begins, ends, training.gradients + training.step)
        return self._always + self.kept_cache + laid_out + most

    @property
    def _always(self) -> float:
        return self.training.weights + self.training.optimizer + self.training.buffers + self.frozen


def memory_table(config: TrainConfig | RLHFConfig, ranks: int, device_bytes: float | None = None) -> list[str]:
    """Return the lines of a table: GiB per rank for each set-up that the job can use, and whether it fits.

    Args:
        config: The job's configuration.
        ranks: Number of ranks.
        device_bytes: Memory of one device; if None, the table has no column for whether it fits.

    Raises:
        ModelError: A model's configuration cannot be read.
        ConfigError: The DeepSpeed configuration that the job names cannot be read.
    """
    states = ("weights", "optimizer", "gradients", "buffers", "frozen", "copy", "KV", "activations")
    columns = ("set-up", *states, "rollout", "update", "host")
    lines = ["  ".join(f"{column:>11}" for column in columns) + ("" if device_bytes is None else "  fits")]
    for setup, need in memory_needs(config, ranks).items():
        of = need.training
        values = [of.weights, of.optimizer, of.gradients, of.buffers + of.backward, need.frozen]
        values += [need.sampling_copy + need.gathered_frozen]
        values += [need.cache, need.activations + need.head, need.rollout, need.update, of.host]
        line = f"{setup:>11}  " + "  ".join(f"{value / GIB:>11.2f}" for value in values)
        if device_bytes is not None:
            line += "  yes" if max(need.rollout, need.update) < device_bytes else "  no"
        lines.append(line)
    return lines


def setups_of(config: TrainConfig | RLHFConfig, ranks: int) -> list[str]:
    """Return the set-ups that a job can use: `ONE_PROCESS` on one rank, the named ones, and its own DeepSpeed file."""
    named = [name for name in SETUPS if name != "z0" or config.policy.dtype == "float32"]
    own = [config.deepspeed.config] if config.deepspeed.config not in SETUPS else []
    return ([ONE_PROCESS] if ranks == 1 else []) + named + own


def memory_needs(config: TrainConfig | RLHFConfig, ranks: int) -> dict[str, Need]:
    """Return the memory of one rank for each set-up that the job can use; see `memory_need`."""
    models = _Models.of(config)
    return {setup: _need(config, models, setup, ranks) for setup in setups_of(config, ranks)}


def memory_need(config: TrainConfig | RLHFConfig, setup: str, ranks: int) -> Need:
    """Return the memory of one rank.

    Args:
        config: The job's configuration.
        setup: `ONE_PROCESS`, or a value of ``deepspeed.config``.
        ranks: Number of ranks.

    Raises:
        ModelError: A model's configuration cannot be read.
        ConfigError: The DeepSpeed configuration cannot be read.
    """
    return _need(config, _Models.of(config), setup, ranks)


@dataclass(frozen=True)
class _Models:
    """Sizes of all models of a job."""

    policy: ModelSize
    trained: tuple[int, ...]
    """Number of elements of each weight that has a gradient."""
    tied: bool
    """Whether the policy's output layer is tied to its embeddings."""
    target: ModelSize | None
    """None if the policy's base model is the target."""
    target_module: nn.Module | None
    """On the meta device."""
    rewards: float
    """Bytes of the reward models."""

    @classmethod
    def of(cls, config: TrainConfig | RLHFConfig) -> _Models:
        policy = build_empty(config.policy)
        target: ModelSize | None = None
        module: Any = None
        if isinstance(config, TrainConfig) and config.target != "policy":
            module = build_empty(config.target_model)
            target = measure(module, config.target_model)
        rewards = [each.model for each in config.reward.components if isinstance(each, ModelRewardConfig)]
        return cls(
            policy=measure(policy, config.policy),
            trained=trained_weights(policy, config.policy.adapter),
            tied=policy.get_output_embeddings().weight is policy.get_input_embeddings().weight,
            target=target,
            target_module=module,
            rewards=float(sum(_reward_bytes(model) for model in rewards)),
        )


def _need(config: TrainConfig | RLHFConfig, models: _Models, setup: str, ranks: int) -> Need:
    size, trained, full = models.policy, models.trained, config.policy.adapter.kind == "full"
    zero = {"stage": 0} if setup == ONE_PROCESS else read_zero_config(setup)["zero_optimization"]

    def training_of(trained: Sequence[int], weights: Sequence[int], reference: Sequence[int]) -> TrainingMemory:
        if setup == ONE_PROCESS:
            return one_process(trained, (sum(weights) + sum(reference)) * size.dtype_bytes, size.dtype_bytes)
        return sharded(zero, trained, weights, reference, size.dtype_bytes, ranks)

    # The reference is a separate model, or the policy without its adapter.
    training = training_of(trained, *((size.weights, size.weights) if full else ((*size.weights, *trained), ())))
    if config.objective.advantage == "gae":  # the critic: a copy with its own output; its LM head is not trained
        held = [*size.weights, *(() if full else trained), size.hidden, 1]
        learned = list(held)
        if not models.tied:
            learned.remove(size.head)
        training = training.beside(training_of(learned, held, ()))
    stages = config.deepspeed
    if stages.offload_reference and full and zero["stage"] < 3:  # in host memory, except for its head
        offloaded = (sum(size.weights) - size.head) * size.dtype_bytes
        training = replace(training, weights=training.weights - offloaded, host=training.host + offloaded)
    item = 0 if models.target is None else models.target.dtype_bytes
    frozen, gathered_frozen = frozen_memory(stages, ranks, models.target_module, item, models.rewards)
    rollout = _Rollout.of(config, models, ranks)
    whole = zero["stage"] < 3
    on_cpu = config.policy.device == "cpu"
    checkpointing = config.policy.gradient_checkpointing
    return Need(
        training=training,
        frozen=frozen,
        gathered_frozen=gathered_frozen,
        sampling_copy=0.0 if whole else size.bytes,
        gathered=0.0 if whole else min(size.bytes, GATHERED_BYTES),
        cache=rollout.cache,
        kept_cache=rollout.cache if on_cpu or rollout.keeps_cache else 0.0,
        sampling_pass=rollout.widest * max(model.pass_bytes for model in (size, models.target) if model is not None),
        activations=size.activation_bytes(rollout.tokens, checkpointing=checkpointing) + rollout.states(size),
        head=size.head * (4 if size.dtype_bytes == 4 else 4 + size.dtype_bytes) if full else 0.0,
        layouts=_layouts(models, full=full, whole=whole, target=stages.target_stage == 0) if on_cpu else (0.0, 0.0),
        several_passes=rollout.samples > rollout.rows,
    )


@dataclass(frozen=True)
class _Rollout:
    """Maximum amounts that a rank samples in a step."""

    samples: int
    """Samples of the policy."""
    sampled: int
    """Tokens per sample."""
    rows: int
    """Samples per micro-batch."""
    tokens: int
    """Tokens per micro-batch; samples of one prompt share it."""
    widest: int
    """Tokens per forward pass of the engine."""
    cache: float
    keeps_cache: bool

    def states(self, policy: ModelSize) -> float:
        """Bytes of the reference's hidden states of all actions, from which the update computes its KL."""
        return self.samples * self.sampled * policy.hidden * policy.dtype_bytes

    @classmethod
    def of(cls, config: TrainConfig | RLHFConfig, models: _Models, ranks: int) -> _Rollout:
        groups, engine = -(-config.rollout.prompts_per_step // ranks), config.rollout.engine
        token_bytes = max(model.cache_bytes for model in (models.policy, models.target) if model is not None)
        if isinstance(config, TrainConfig):
            size, running = config.rollout.rewrites_per_prompt, config.rollout.responses_per_rewrite
            sampled, prompt = config.rollout.rewrite.max_tokens, config.prompting.max_prompt_tokens
            longest = prompt + max(sampled, config.rollout.respond.max_tokens)
            keeps = config.rollout.keep_cache and models.target is not None
        else:
            size, running = config.rollout.responses_per_prompt, 1
            sampled, prompt = config.rollout.respond.max_tokens, config.max_prompt_tokens
            longest, keeps = prompt + sampled, False
        samples = groups * size
        rows = min(samples, max(1, config.optimizer.micro_batch_size // size) * size)
        at_once = min(engine.max_batch, samples * running)
        return cls(
            samples=samples,
            sampled=sampled,
            rows=rows,
            tokens=-(-rows // size) * prompt + rows * sampled,
            widest=min(engine.token_budget, groups * prompt + samples * sampled),
            cache=float(token_bytes * at_once * longest if engine.pool_bytes is None else engine.pool_bytes),
            keeps_cache=keeps,
        )


def _reward_bytes(config: ModelConfig) -> int:
    model = build_empty(config, AutoModelForSequenceClassification)
    return sum(weight.numel() for weight in model.parameters()) * DTYPES[config.dtype].itemsize


def _layouts(models: _Models, *, full: bool, whole: bool, target: bool) -> tuple[float, float]:
    """Return the bytes of second layouts of linear layers, of the policy and of frozen models; see `packed_linear`."""
    own = _layout(models.policy)
    return own, (_layout(models.target) if target and models.target is not None else 0.0) + (
        own if full and whole else 0.0
    )


def _layout(size: ModelSize) -> float:
    laid_out = size.linear * size.dtype_bytes
    return float(laid_out) if size.dtype_bytes == 4 and laid_out <= MAX_PACKED_BYTES else 0.0
