"""Memory per rank for each DeepSpeed set-up, from the configuration alone.

Only the models' config.json files are loaded. The estimate counts tensors at the two peaks of a step, the rollout and the
update. It excludes fragmentation in the allocator and the libraries' own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification

from alignpro.config import ModelConfig, ModelRewardConfig, PolicyConfig, RLHFConfig, TrainConfig, separate_models
from alignpro.distributed.deepspeed.zero_config import read_zero_config
from alignpro.distributed.sharding.gathered_model import GATHERED_BYTES
from alignpro.models.cpu.packed_linear import MAX_PACKED_BYTES, no_kernels
from alignpro.models.loading import is_adapter, resolve_dtype
from alignpro.planning.model_size import ModelSize, build_empty, goes_on_training, measure, trained_weights, trains_all
from alignpro.planning.zero_memory import TrainingMemory, torch_memory, zero_memory

GIB = float(1 << 30)
ONE_PROCESS = "one"
"""The set-up without DeepSpeed: plain torch in a single process."""
SETUPS = ("z0", "z1", "z2", "z3", "z2_offload", "z3_offload")
"""The DeepSpeed set-ups of launch/zero/."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank, in bytes."""

    training: TrainingMemory
    frozen: float
    """Target and reward models."""
    sampling_copy: float
    """The policy's full weights, gathered for the rollout at stage 3."""
    gathered_frozen: float
    """The target's gathered weights, if it has a ZeRO stage of its own. Reward models are not counted: they are gathered
    when the rollout's memory has been freed."""
    gather_buffer: float
    """Weights that are gathered at a time for the sampling copy, before sampling begins."""
    cache: float
    """Keys and values of all sequences that run at once, each at its maximum length."""
    retained_cache: float
    """The part of ``cache`` that stays during the update: the frozen target's; on a CPU all of it."""
    sampling_pass: float
    """Activations of the largest forward pass of a rollout."""
    activations: float
    """Activations of a micro-batch, and what all samples of the step keep for the update."""
    head: float
    """The output layer's gradient in float32 and in the weights' dtype; both exist before the backward pass begins."""
    packed_policy: float
    """Packed copies of the policy's linear layers on a CPU, for the rollout."""
    packed_frozen: float
    """Packed copies of the linear layers of target and reference on a CPU."""
    several_micro_batches: bool
    """Whether a step has more than one micro-batch."""

    @property
    def rollout(self) -> float:
        """Bytes at the peak of the rollout."""
        gradients = self.training.gradients if self.training.gradient_allocation == "permanent" else 0.0
        sampling = max(self.gather_buffer + self.retained_cache, self.cache + self.packed_policy + self.sampling_pass)
        return self._resident + gradients + self.sampling_copy + self.gathered_frozen + self.packed_frozen + sampling

    @property
    def update(self) -> float:
        """Bytes at the peak of the update: when a backward pass begins, when the last one ends, or in the optimizer step."""
        training = self.training
        allocated_early = self.several_micro_batches or training.gradient_allocation != "gradual"
        begins = self.activations + self.head + (training.gradients if allocated_early else 0.0) + training.backward
        ends = training.gradients + training.backward
        # The packed copy of a sampling copy has been freed with it.
        packed = self.packed_frozen + (0.0 if self.sampling_copy else self.packed_policy)
        return self._resident + self.retained_cache + packed + max(begins, ends, training.gradients + training.step)

    @property
    def peak(self) -> float:
        """Bytes at the higher of the two peaks."""
        return max(self.rollout, self.update)

    @property
    def _resident(self) -> float:
        return self.training.weights + self.training.optimizer + self.training.buffers + self.frozen


def setups_of(config: TrainConfig | RLHFConfig, ranks: int) -> list[str]:
    """Return the set-ups that a job can use: `ONE_PROCESS` on one rank, the named ones, and its own DeepSpeed file."""
    named = [name for name in SETUPS if name != "z0" or config.policy.dtype == "float32"]
    own = [config.deepspeed.config] if config.deepspeed.config not in SETUPS else []
    return ([ONE_PROCESS] if ranks == 1 else []) + named + own


def estimate_setups(config: TrainConfig | RLHFConfig, ranks: int) -> dict[str, MemoryEstimate]:
    """Return the memory of one rank for each set-up that the job can use; see `estimate_memory`."""
    models = JobModels.of(config)
    return {setup: estimate_memory(config, setup, ranks, models) for setup in setups_of(config, ranks)}


def estimate_memory(
    config: TrainConfig | RLHFConfig, setup: str, ranks: int, models: JobModels | None = None
) -> MemoryEstimate:
    """Return the memory of one rank.

    Args:
        config: The job's configuration.
        setup: `ONE_PROCESS`, or a value of ``deepspeed.config``.
        ranks: Number of ranks.
        models: The sizes of the job's models; measured if None.

    Raises:
        ModelError: A model's configuration cannot be read.
        ConfigError: The DeepSpeed configuration cannot be read, or ``optimizer.micro_batch_size`` is not a number.
    """
    models = models or JobModels.of(config)
    policy, full, measured = models.policy, trains_all(config.policy), config.objective.step_kl is not None
    zero = {"stage": 0} if setup == ONE_PROCESS else read_zero_config(setup)["zero_optimization"]
    sharded = zero["stage"] == 3
    updated = policy.plain if sharded else policy
    rollout = _Rollout.of(config, models, ranks)
    on_cpu = config.policy.device == "cpu"
    apart = [
        each for each, equal in zip(models.targets, models.equal, strict=True) if setup != ONE_PROCESS or not equal
    ]
    target_bytes = float(sum(each.bytes for each in apart))
    target_sharded = config.deepspeed.target_stage == 3
    packed_policy = _packed_bytes(policy) if on_cpu else 0.0
    packed_target = sum(map(_packed_bytes, apart)) if on_cpu and not target_sharded else 0.0
    packed_rewards = 0.0 if config.deepspeed.reward_stage == 3 else models.packed_reward_bytes
    return MemoryEstimate(
        training=_training(config, models, setup, zero, ranks),
        frozen=(
            target_bytes / (ranks if target_sharded else 1)
            + models.reward_bytes / (ranks if config.deepspeed.reward_stage == 3 else 1)
        ),
        gathered_frozen=target_bytes if target_sharded else 0.0,
        sampling_copy=policy.bytes if sharded else 0.0,
        gather_buffer=min(policy.bytes, GATHERED_BYTES) if sharded else 0.0,
        cache=rollout.cache,
        retained_cache=rollout.cache if on_cpu or rollout.keeps_cache else 0.0,
        sampling_pass=rollout.pass_tokens * max(model.pass_bytes for model in models.generating),
        activations=(
            updated.activation_bytes(rollout.micro_batch_tokens, checkpointing=config.policy.gradient_checkpointing)
            + rollout.state_bytes(updated)
            * (2 if measured else 1)  # the reference's, and the policy's before the update
        ),
        head=(policy.head_gradient_bytes + (policy.head_bytes if measured else 0)) if full else 0.0,
        packed_policy=packed_policy,
        packed_frozen=packed_target + packed_rewards + (packed_policy if full and not sharded else 0.0),
        several_micro_batches=rollout.samples > rollout.micro_batch_rows,
    )


@dataclass(frozen=True)
class JobModels:
    """Sizes of all models of a job."""

    policy: ModelSize
    trained: tuple[int, ...]
    """Number of elements of each weight that has a gradient."""
    tied: bool
    """Whether the policy's output layer is tied to its embeddings."""
    targets: tuple[ModelSize, ...]
    """Those in this process, apart from the policy's base model."""
    equal: tuple[bool, ...]
    """Whether each of them has the frozen weights of the policy or its reference, which one process then holds once."""
    reward_bytes: float
    """Of all reward models."""
    packed_reward_bytes: float
    """Of the packed copies of their linear layers."""

    @classmethod
    def of(cls, config: TrainConfig | RLHFConfig) -> JobModels:
        """Measure the models of a job.

        Raises:
            ModelError: A model's configuration cannot be read.
        """
        policy = build_empty(config.policy)
        targets = separate_models(config.target) if isinstance(config, TrainConfig) else []
        rewards = [
            _reward_bytes(each.model) for each in config.reward.components if isinstance(each, ModelRewardConfig)
        ]
        return cls(
            policy=measure(policy, config.policy),
            trained=trained_weights(policy, config.policy),
            tied=policy.get_output_embeddings().weight is policy.get_input_embeddings().weight,
            targets=tuple(measure(build_empty(target), target) for target in targets),
            equal=tuple(_equals_frozen_weights(target, config.policy) for target in targets),
            reward_bytes=float(sum(weights for weights, _ in rewards)),
            packed_reward_bytes=float(sum(packed for _, packed in rewards)),
        )

    @property
    def generating(self) -> list[ModelSize]:
        """The models that the engine runs."""
        return [self.policy, *self.targets]


def _equals_frozen_weights(target: ModelConfig, policy: PolicyConfig) -> bool:
    """Whether a target is the model that a policy starts from, whose weights stay as they are in the policy or its reference."""
    same = (target.path, target.device, resolve_dtype(target)) == (policy.path, policy.device, resolve_dtype(policy))
    kept = not trains_all(policy) or policy.reference in (None, policy.path)
    return same and kept and not policy.from_scratch and not is_adapter(policy.path)


def _training(
    config: TrainConfig | RLHFConfig, models: JobModels, setup: str, zero: dict[str, Any], ranks: int
) -> TrainingMemory:
    """Memory of the policy, its reference and the critic."""
    size, trained, full = models.policy, models.trained, trains_all(config.policy)

    def memory(trained: Sequence[int], weights: Sequence[int], reference: Sequence[int]) -> TrainingMemory:
        if setup == ONE_PROCESS:
            return torch_memory(trained, (sum(weights) + sum(reference)) * size.dtype_bytes, size.dtype_bytes)
        return zero_memory(zero, trained, weights, reference, size.dtype_bytes, ranks)

    # The reference is a separate model, or the policy without its adapter.
    # That of an adapter that goes on training is a copy of the adapter, on the same base model.
    copied = size.weights if full else trained if goes_on_training(config.policy) else ()
    total = memory(trained, size.weights if full else (*size.weights, *trained), copied)
    if config.objective.advantage == "gae":  # the critic: a copy with its own output; its LM head is not trained
        held = [*size.weights, *(() if full else trained), size.hidden, 1]
        learned = list(held)
        if not models.tied:
            learned.remove(size.head)
        total = total.combined_with(memory(learned, held, ()))
    if config.deepspeed.offload_reference and full and zero["stage"] < 3:  # in host memory, except for its head
        offloaded = (sum(size.weights) - size.head) * size.dtype_bytes
        total = replace(total, weights=total.weights - offloaded, host=total.host + offloaded)
    return total


@dataclass(frozen=True)
class _Rollout:
    """Maximum amounts that a rank samples in a step."""

    samples: int
    """Samples of the policy."""
    sample_tokens: int
    """Tokens per sample."""
    micro_batch_rows: int
    """Samples per micro-batch."""
    micro_batch_tokens: int
    """Tokens per micro-batch; samples of one prompt share it."""
    pass_tokens: int
    """Tokens per forward pass of the engine."""
    cache: float
    keeps_cache: bool

    def state_bytes(self, policy: ModelSize) -> float:
        """Bytes of the reference's hidden states of all actions, from which the update computes its KL."""
        return self.samples * self.sample_tokens * policy.hidden * policy.states_bytes

    @classmethod
    def of(cls, config: TrainConfig | RLHFConfig, models: JobModels, ranks: int) -> _Rollout:
        groups, engine = -(-config.rollout.prompts_per_step // ranks), config.rollout.engine
        if isinstance(config, TrainConfig):
            group_size, responses = config.rollout.rewrites_per_prompt, config.rollout.responses_per_rewrite
            sample, prompt = config.rollout.rewrite.max_tokens, config.prompting.max_prompt_tokens
            answer = config.rollout.respond.max_tokens
            longest = prompt + (sample + answer if config.prompting.form == "addition" else max(sample, answer))
            keeps_cache = config.rollout.keep_cache and bool(models.targets)
        else:
            group_size, responses = config.rollout.responses_per_prompt, 1
            sample, prompt = config.rollout.respond.max_tokens, config.max_prompt_tokens
            longest, keeps_cache = prompt + sample, False
        samples = groups * group_size
        rows = min(samples, micro_batch_rows(config, group_size))
        token_bytes = max(model.cache_bytes for model in models.generating)
        running = min(engine.max_batch, samples * responses)
        return cls(
            samples=samples,
            sample_tokens=sample,
            micro_batch_rows=rows,
            micro_batch_tokens=-(-rows // group_size) * prompt + rows * sample,
            pass_tokens=min(engine.token_budget, groups * prompt + samples * sample),
            cache=float(token_bytes * running * longest if engine.pool_bytes is None else engine.pool_bytes),
            keeps_cache=keeps_cache,
        )


def micro_batch_rows(config: TrainConfig | RLHFConfig, group_size: int) -> int:
    """Return the samples per micro-batch, of which there may be fewer: whole groups, unless one is larger than that.

    Losses other than these may need all samples of a group.
    """
    size = config.optimizer.rows_per_pass
    if size < group_size and config.objective.loss in ("policy_gradient", "ppo_clip", "distillation"):
        return size
    return max(1, size // group_size) * group_size


def _reward_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of a reward model, and of the packed copies of its linear layers."""
    model, dtype = build_empty(config, AutoModelForSequenceClassification), resolve_dtype(config)
    linear = sum(each.weight.numel() for each in model.base_model.modules() if isinstance(each, nn.Linear))
    copied = linear * dtype.itemsize
    packed = config.device == "cpu" and no_kernels() is None and copied <= MAX_PACKED_BYTES.get(dtype, 0)
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize, copied if packed else 0


def _packed_bytes(size: ModelSize) -> float:
    """Bytes of the packed copies of a model's linear layers; see `packed_linear`."""
    linear_bytes = size.packed * size.dtype_bytes
    # On a CPU float32 states are those of float32 weights or of bfloat16 weights.
    most = {dtype.itemsize: limit for dtype, limit in MAX_PACKED_BYTES.items()}.get(size.dtype_bytes, 0)
    return float(linear_bytes) if size.states_bytes == 4 and linear_bytes <= most else 0.0
