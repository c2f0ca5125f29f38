"""Run a training job, given its configuration: what `alignpro train`, `rlhf`, `sft` and `reward` do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from alignpro.config import (
    ConfigSource,
    RewardModelConfig,
    RLHFConfig,
    RunSection,
    SFTConfig,
    TrainConfig,
    resolve_config,
    target_endpoints,
)
from alignpro.distributed.launcher import launched
from alignpro.distributed.ranks import Ranks
from alignpro.errors import ConfigError
from alignpro.models.progress_bars import without_progress_bars
from alignpro.planning.memory import ONE_PROCESS
from alignpro.planning.spending import check_budget
from alignpro.targets.servers import NO_SERVERS, Servers, open_servers
from alignpro.training import multi_process
from alignpro.training.builders import prompter_training, response_training
from alignpro.training.distribution import Distribution, SingleProcess
from alignpro.training.micro_batch_size import keep_micro_batch_size, settle_micro_batch_size
from alignpro.training.preference import RewardTrainer
from alignpro.training.preflight import check_inputs, check_reward_servers
from alignpro.training.recorded_holdout import keep_holdout
from alignpro.training.run import Run, Trainer
from alignpro.training.supervised import SFTTrainer

Job = Literal["train", "rlhf", "sft", "reward"]

CONFIGS: dict[str, type[RunSection]] = {
    "train": TrainConfig,
    "rlhf": RLHFConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
}
"""The configuration of each training command."""


@without_progress_bars()
def train(
    config: ConfigSource[RunSection],
    *,
    job: Job = "train",
    resume: bool = False,
    from_step: int | None = None,
    ranks: Ranks | None = None,
) -> Run:
    """Train as a command of `alignpro` does: in this process, or on all ranks if a launcher has started it.

    Args:
        config: A typed configuration, whose type says which job it is; or a mapping of its sections, the path of a YAML
            file, or a list of YAML files and overrides (``"run.steps=20"``), for ``job``. Paths may be strings or `Path`,
            and the ``function`` of a reward may be a function.
        job: The command: ``train``, ``rlhf``, ``sft`` or ``reward``.
        resume: Continue the run in ``run.out``; start one if there is none.
        from_step: With ``resume``: the step to continue from, by default that of the newest intact checkpoint.
        ranks: The process group that the caller has joined; by default that of the launcher, if there is one.

    Returns:
        The finished run: its directory ``out`` and its ``metrics``, one row per step.

    Raises:
        Interrupted: SIGINT or SIGTERM asked the run to stop; its state is saved.
        AlignProError: The message says what was wrong, where and what to do. See `Run`.
    """
    if from_step is not None and not resume:
        raise ConfigError("from_step names the checkpoint to continue from: it requires resume=True")
    if not isinstance(config, RunSection):
        if job not in CONFIGS:
            raise ConfigError(f"job={job!r}: expected {', '.join(CONFIGS)}")
        config = resolve_config(CONFIGS[job], config)
    if resume:
        config = config.model_copy(update={"data": keep_holdout(config.data, [config.run.out])})
    if launched() if ranks is None else ranks.group is not None:
        return multi_process.train(config, build_trainer, resume, from_step, ranks)
    if resume:
        config = keep_micro_batch_size(config, Ranks())
    with Run(config, resume=resume, from_step=from_step) as run:  # before any model is loaded
        if not run.finished:
            check_inputs(config)
            check_budget(config)
            with _servers(config) as servers:
                check_reward_servers(config, servers)
                config = settle_micro_batch_size(config, run, ONE_PROCESS)
                run.train(build_trainer(config, SingleProcess(), servers))
    return run


def _servers(config: RunSection) -> AbstractContextManager[Servers]:
    """The servers that a job asks."""
    if isinstance(config, TrainConfig | RLHFConfig):
        targets = target_endpoints(config.target) if isinstance(config, TrainConfig) else []
        return open_servers(config, targets, config.run.out, config.rollout.respond, config.reward.endpoints)
    return nullcontext(NO_SERVERS)


def build_trainer(config: RunSection, distribution: Distribution, servers: Servers = NO_SERVERS) -> Trainer:
    """Load data and models of a job, and build its trainer.

    Raises:
        AlignProError: Data or models cannot be used.
    """
    match config:
        case TrainConfig():
            return prompter_training(config, distribution, servers)
        case RLHFConfig():
            return response_training(config, distribution, servers)
        case SFTConfig():
            return SFTTrainer(config)
        case RewardModelConfig():
            return RewardTrainer(config)
        case _:
            raise TypeError(f"{type(config).__name__} is not the configuration of a training job")
