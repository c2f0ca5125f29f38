"""Running a training job as one of the ranks that a launcher has started."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from alignpro.config import RLHFConfig, RunSection, TrainConfig, target_endpoints
from alignpro.distributed.deepspeed.compilation import compile_operators
from alignpro.distributed.deepspeed.zero_config import ZeroConfig, check_ranks, load_zero_config, require_deepspeed
from alignpro.distributed.launcher import launched_here, launched_world_size
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.session import distributed_session
from alignpro.errors import ConfigError
from alignpro.planning.spending import check_budget
from alignpro.targets.servers import NO_SERVERS, Servers
from alignpro.training.distribution import Distribution
from alignpro.training.micro_batch_size import keep_micro_batch_size, settle_micro_batch_size
from alignpro.training.preflight import check_inputs, check_reward_servers
from alignpro.training.rank_servers import open_rank_servers
from alignpro.training.run import Run, Trainer

logger = logging.getLogger(__name__)

_PATH_KEYS = {"out", "source", "path", "tokenizer", "chat_template", "meta_prompt", "template", "function"}
"""Last parts of the keys whose values may be file names."""


def train(
    config: RunSection,
    build: Callable[[RunSection, Distribution, Servers], Trainer],
    resume: bool = False,
    from_step: int | None = None,
    ranks: Ranks | None = None,
) -> Run:
    """Train on all ranks together.

    Args:
        config: Configuration of `alignpro train` or `alignpro rlhf`.
        build: Builds the trainer from the configuration.
        resume: Continue the run in the directory.
        from_step: The step to continue from.
        ranks: The process group, if this process has joined it already.

    Raises:
        ConfigError: The job does not run on several ranks, or not on so many, the ranks' configurations differ, DeepSpeed is
            missing or broken, its configuration contradicts the job's, the device cannot train in the policy's dtype, or a
            DeepSpeed extension cannot be compiled.
        AlignProError: As `Run`; `PeerError` if another rank reports the error.
    """
    if not isinstance(config, TrainConfig | RLHFConfig):
        raise ConfigError(
            "only `alignpro train` and `alignpro rlhf` run on several ranks: start this without a launcher"
        )
    size = launched_world_size() if ranks is None else ranks.size
    # Before DeepSpeed is imported, which takes long and prints much.
    check_ranks(config.rollout.prompts_per_step, size)
    _check_devices()
    require_deepspeed()
    zero = resolve_zero_config(config, size)
    _require_dtype(config.policy.dtype)
    if ranks is not None:
        return _train_on(ranks, config, zero, build, resume, from_step)
    compile_operators(offload=zero.offloads_optimizer)
    with distributed_session(config.deepspeed.timeout_seconds) as ranks:
        return _train_on(ranks, config, zero, build, resume, from_step)


def _train_on(
    ranks: Ranks,
    config: TrainConfig | RLHFConfig,
    zero: ZeroConfig,
    build: Callable[[RunSection, Distribution, Servers], Trainer],
    resume: bool,
    from_step: int | None,
) -> Run:
    from alignpro.training.deepspeed_backend import DeepSpeedDistribution  # takes two seconds to import

    _require_equal_configurations(ranks, config)
    with ranks.raise_together():
        check_inputs(config)
        check_budget(config)
    logger.info("%d ranks, ZeRO stage %d (%s)", ranks.size, zero.stage, zero.name)
    if resume:
        config = keep_micro_batch_size(config, ranks)
    with Run(config, resume=resume, from_step=from_step, ranks=ranks) as run:
        if not run.finished:
            config = settle_micro_batch_size(config, run, config.deepspeed.config)
            zero = resolve_zero_config(config, ranks.size)
            with _servers(ranks, config) as servers:
                servers.known.update(ranks.on_rank_zero(partial(_check_rewards, config, servers)))
                run.train(build(config, DeepSpeedDistribution(ranks, zero, config.deepspeed), servers))
    return run


def _servers(ranks: Ranks, config: TrainConfig | RLHFConfig) -> AbstractContextManager[Servers]:
    """The servers that a job asks."""
    if isinstance(config, TrainConfig | RLHFConfig):
        targets = target_endpoints(config.target) if isinstance(config, TrainConfig) else []
        rewards = config.reward.endpoints
        return open_rank_servers(ranks, config, targets, config.run.out, config.rollout.respond, rewards)
    return nullcontext(NO_SERVERS)


def _check_rewards(config: RunSection, servers: Servers) -> dict[str, Any]:
    """Check the servers of rewards; returns all that is known of servers now, for the other ranks."""
    check_reward_servers(config, servers)
    return servers.known.as_dict()


def _require_equal_configurations(ranks: Ranks, config: RunSection) -> None:
    """Raise on all ranks if one was started with different settings, for example from a stale file on its node.

    Paths may differ between nodes. Data and policy are compared between ranks once they are loaded.
    """

    def describe(rank: int, settings: dict[str, Any], first: dict[str, Any]) -> ConfigError:
        key = min(key for key in first.keys() | settings.keys() if first.get(key) != settings.get(key))
        return ConfigError(
            f"rank {rank} has {key}={settings.get(key)}, and rank 0 {key}={first.get(key)}: start all ranks with the same "
            "configuration file and overrides"
        )

    settings = _flatten(config.model_dump(mode="json"))
    ranks.require_equal({k: v for k, v in settings.items() if _PATH_KEYS.isdisjoint(k.split("."))}, describe)


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to dotted keys and their values."""
    if isinstance(value, dict):
        return {name: leaf for part, each in value.items() for name, leaf in _flatten(each, f"{key}.{part}").items()}
    if isinstance(value, list):
        return _flatten(dict(enumerate(value)), key)
    return {key.removeprefix("."): value}


def _check_devices() -> None:
    """Check that each rank of this machine has a GPU of its own, if there are any."""
    devices, ranks = torch.cuda.device_count(), launched_here() or 1
    if 0 < devices < ranks:
        raise ConfigError(
            f"{ranks} ranks on a machine with {devices} GPU{'' if devices == 1 else 's'}: start one for each "
            f"(deepspeed --num_gpus {devices})"
        )


def _require_dtype(dtype: str) -> None:
    """Check that DeepSpeed supports training in a dtype on this device."""
    from deepspeed.accelerator import get_accelerator  # takes two seconds to import, and is optional

    accelerator = get_accelerator()
    supported = {"float16": accelerator.is_fp16_supported, "bfloat16": accelerator.is_bf16_supported}
    if dtype in supported and not supported[dtype]():
        raise ConfigError(
            f"policy.dtype={dtype}: DeepSpeed does not train in it on this device ({accelerator.device_name()}); take "
            + ("bfloat16 or float32" if dtype == "float16" else "float16 or float32")
        )


def resolve_zero_config(config: TrainConfig | RLHFConfig, ranks: int) -> ZeroConfig:
    """Build the job's complete DeepSpeed configuration.

    Raises:
        ConfigError: It contradicts the job's configuration.
    """
    rollout = config.rollout
    match config:
        case TrainConfig():
            samples_per_prompt = config.rollout.rewrites_per_prompt
        case RLHFConfig():
            samples_per_prompt = config.rollout.responses_per_prompt
    zero = load_zero_config(
        config.deepspeed.config,
        config.policy,
        config.optimizer,
        samples_per_update=rollout.prompts_per_step * samples_per_prompt // config.objective.minibatches,
        ranks=ranks,
    )
    if isinstance(config, TrainConfig) and config.target == "policy":
        if zero.stage == 3:
            raise ConfigError(
                f"target=policy with deepspeed.config={zero.name}: at stage 3 the weights that policy and target share are "
                "sharded; use a stage from 0 to 2, or name a separate target model"
            )
        if config.deepspeed.target_stage == 3:
            raise ConfigError(
                "target=policy with deepspeed.target_stage=3: the target shares the policy's weights, whose stage is that of "
                "deepspeed.config; use target_stage=0, or name a separate target model"
            )
    if config.deepspeed.offload_reference and zero.stage == 3:
        raise ConfigError(
            f"deepspeed.offload_reference with deepspeed.config={zero.name}: at stage 3 the reference is sharded with the "
            "policy; use z3_offload to keep both in host memory"
        )
    return zero
