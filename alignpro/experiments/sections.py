"""The configuration of each training and evaluation of an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from alignpro.config import (
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    RivalConfig,
    RivalMethod,
    RLHFConfig,
    SFTConfig,
    TargetAdapterMethod,
    TrainConfig,
    validate_config,
)
from alignpro.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def prior_sections(config: ExperimentConfig, name: str, out: Path) -> SFTConfig:
    """`alignpro sft` of a prompter.

    Raises:
        ConfigError: The sections are invalid; the message names the prompter.
    """
    prompter = config.prompters[name]
    common = {
        "run": {"out": str(out), "tensorboard": False},
        "policy": prompter.policy,
        "prompting": config.prompting.model_dump(mode="json"),
    }
    return _validated(SFTConfig, f"prompters.{name}.prior", common, prompter.prior or {})


def train_sections(
    config: ExperimentConfig,
    where: str,
    *,
    policy: Mapping[str, Any],
    target: str,
    task: str,
    settings: Sequence[Mapping[str, Any]],
    seed: int,
    out: Path,
) -> TrainConfig:
    """`alignpro train` of a cell.

    Args:
        config: The experiment.
        where: What the settings belong to, for messages.
        policy: The section of the policy; its path is that of the model that training starts from.
        target: Name of the target.
        task: Name of the task.
        settings: What the method sets, the last word last.
        seed: The run's seed.
        out: The run directory.

    Raises:
        ConfigError: The sections are invalid; the message names ``where``.
    """
    common = _of_run(config, task, seed, out) | {
        "policy": policy,
        "target": target_sections(config, target),
        "prompting": config.prompting.model_dump(mode="json"),
        "rollout": {
            "rewrite": config.rewrite.model_dump(mode="json"),
            "respond": config.respond.model_dump(mode="json"),
            "engine": config.engine.model_dump(mode="json"),
        },
    }
    return _validated(TrainConfig, where, common, config.train, *settings)


def rlhf_sections(
    config: ExperimentConfig,
    where: str,
    *,
    target: str,
    task: str,
    settings: Sequence[Mapping[str, Any]],
    seed: int,
    out: Path,
) -> RLHFConfig:
    """`alignpro rlhf` of a cell; the arguments are those of `train_sections`."""
    common = _of_run(config, task, seed, out) | {
        "policy": config.targets[target],
        "rollout": {
            "respond": config.respond.model_dump(mode="json"),
            "engine": config.engine.model_dump(mode="json"),
        },
    }
    return _validated(RLHFConfig, where, common, config.rlhf, *settings)


def rival_sections(
    config: ExperimentConfig,
    where: str,
    *,
    target: str,
    task: str,
    method: RivalMethod,
    calls: int,
    seed: int,
    out: Path,
) -> RivalConfig:
    """`alignpro rival` of a cell, with at most ``calls`` responses; the other arguments are those of `train_sections`."""
    common = {
        "out": str(out),
        "seed": seed,
        "kind": method.kind,
        "data": config.tasks[task].data.model_dump(mode="json"),
        "target": target_sections(config, target),
        "reward": config.tasks[task].reward.model_dump(mode="json"),
        "instructions": config.tasks[task].instructions,
        "target_calls": calls,
        "search": method.search.model_dump(mode="json"),
        "prompting": config.prompting.model_dump(mode="json"),
        "respond": config.respond.model_dump(mode="json"),
        "engine": config.engine.model_dump(mode="json"),
        **config.spending.model_dump(mode="json"),
    }
    return _validated(RivalConfig, where, common)


def eval_sections(
    config: ExperimentConfig, where: str, *, target: str, task: str, seed: int, out: Path, arms: Mapping[str, Any]
) -> EvalConfig:
    """`alignpro eval` of a cell.

    Args:
        config: The experiment.
        where: What is evaluated, for messages.
        target: Name of the target.
        task: Name of the task.
        seed: The seed of all samples.
        out: The directory of the evaluation.
        arms: The keys of `EvalConfig` that name the arms and the models of the cell.

    Raises:
        ConfigError: The sections are invalid; the message names ``where``.
    """
    data = config.tasks[task].heldout or config.tasks[task].data
    common = {
        "out": str(out),
        "title": config.title,
        "seed": seed,
        "data": data.model_dump(mode="json"),
        "target": target_sections(config, target),
        "reward": config.tasks[task].reward.model_dump(mode="json"),
        "prompting": config.prompting.model_dump(mode="json"),
        "rewrite": config.rewrite.model_dump(mode="json"),
        "respond": config.respond.model_dump(mode="json"),
        "engine": config.engine.model_dump(mode="json"),
        "also_fit": [model_sections(each, each["path"]) for each in _prompters(config)],
        "kl_coef": config.kl_coef,
        **config.evaluation.model_dump(),
        **config.spending.model_dump(mode="json"),
    }
    return _validated(EvalConfig, where, common, arms)


def _prompters(config: ExperimentConfig) -> list[Mapping[str, Any]]:
    """The models that write rewrites in some cell: prompters, and targets with an adapter."""
    adapters = [method for method in config.methods.values() if isinstance(method, TargetAdapterMethod)]
    adapted = [
        each
        for name, each in config.targets.items()
        if any(method.runs(task, name) for method in adapters for task in config.tasks)
    ]
    return [*(each.policy for each in config.prompters.values()), *adapted]


def target_sections(config: ExperimentConfig, name: str) -> dict[str, Any]:
    """A target of an experiment, in whose mixture names stand for other targets of the experiment."""
    given = config.targets[name]
    if not is_mixture(config, name):
        return given
    named = [config.targets[each] | {"name": each} if isinstance(each, str) else each for each in given["mixture"]]
    return given | {"mixture": named}


def is_mixture(config: ExperimentConfig, name: str) -> bool:
    """Whether a target is a mixture of several."""
    return "mixture" in config.targets[name]


def model_sections(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The keys of a model that say how it is loaded, without those that say how it is trained."""
    return {key: value for key, value in given.items() if key in ModelConfig.model_fields} | {"path": path}


def _of_run(config: ExperimentConfig, task: str, seed: int, out: Path) -> dict[str, Any]:
    """The sections that prompters and oracles have in common."""
    return {
        "run": {"out": str(out), "seed": seed, "tensorboard": False},
        "data": config.tasks[task].data.model_dump(mode="json"),
        "reward": config.tasks[task].reward.model_dump(mode="json"),
        "objective": {"kl": {"coef": config.kl_coef}},
        **config.spending.model_dump(mode="json"),
    }


def _validated(kind: type[ConfigT], where: str, *layers: Mapping[str, Any]) -> ConfigT:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer)
    try:
        return validate_config(kind, merged)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key; lists and values replaced, as in layered YAML files."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
