"""The commands of a cell: a training or a search, if its method has one, and an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignpro.config import (
    BestOfMethod,
    EvalConfig,
    ExperimentConfig,
    GibbsMethod,
    InstructionMethod,
    Method,
    PriorMethod,
    RivalMethod,
    RLHFMethod,
    SelfRewardMethod,
    SoftPromptMethod,
    TargetAdapterMethod,
    TrainConfig,
    TrainMethod,
    UnchangedMethod,
    needs_prompter,
)
from alignpro.config.jobs import gibbs_arms
from alignpro.engine import derive_seed
from alignpro.experiments.sections import (
    eval_sections,
    model_sections,
    rival_sections,
    rlhf_sections,
    train_sections,
)


@dataclass(frozen=True)
class Job:
    """A command of `alignpro` with its configuration."""

    command: str
    """``sft``, ``train``, ``rlhf``, ``rival`` or ``eval``."""
    config: BaseModel
    file: Path
    """Where the configuration is written."""
    result: Path
    """What exists once it has finished."""

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        return self.result.exists()


@dataclass(frozen=True)
class Place:
    """Where a cell stands in an experiment."""

    config: ExperimentConfig
    """That of its point, in a sweep."""
    name: str
    """Of the cell, for messages."""
    directory: Path
    task: str
    target: str
    seed: int
    variant: str | None
    """The prompter or the instruction; None if the method has neither."""


def cell_jobs(place: Place, method: Method, *, evaluated: bool = True) -> tuple[Job, ...]:
    """The jobs of a cell in their order.

    Args:
        place: Of the cell.
        method: Its method.
        evaluated: Whether it is evaluated on its own target.

    Raises:
        ConfigError: The configuration of a job is invalid; the message names the cell.
    """
    prepare, arms = _preparation(place, method)
    evaluation = (_evaluation(place, arms),) if evaluated else ()
    return (*prepare, *evaluation)


def transfer_jobs(place: Place, training: TrainConfig) -> tuple[Job, ...]:
    """The evaluation on the target of ``place`` of a prompter that was trained on another one.

    Args:
        place: Of the cell; its variant is the prompter.
        training: Its training.

    Raises:
        ConfigError: Its configuration is invalid; the message names the cell.
    """
    return (_evaluation(place, _trained_arms(place, training)),)


def self_reward_jobs(
    place: Place, method: SelfRewardMethod, alpha: float, iteration: int, before: Path | None
) -> tuple[Job, ...]:
    """An iteration of self-reward, and its evaluation.

    Args:
        place: Of the cell.
        method: Its method.
        alpha: α.
        iteration: Its number, from 1.
        before: The run directory of the iteration before; None of the first.

    Raises:
        ConfigError: A configuration is invalid; the message names the cell.
    """
    run = place.directory / "run"
    start = {"path": start_of(place.config, place.variant)}
    training = train_sections(
        place.config,
        place.name,
        policy=_policy(place) | (start if before is None else {"path": str(before / "model"), "from_scratch": False}),
        target=place.target,
        task=place.task,
        settings=[method.sections(alpha), method.settings],
        seed=place.seed if before is None else derive_seed(place.seed, "iteration", iteration),
        out=run,
    )
    job = Job("train", training, place.directory / "train.yaml", run / "model")
    return job, _evaluation(place, _trained_arms(place, training))


def _evaluation(place: Place, arms: dict[str, Any]) -> Job:
    out = place.directory / "evaluation"
    evaluation: EvalConfig = eval_sections(
        place.config, place.name, target=place.target, task=place.task, seed=place.seed, out=out, arms=arms
    )
    return Job("eval", evaluation, place.directory / "eval.yaml", out / "summary.json")


def _preparation(place: Place, method: Method) -> tuple[list[Job], dict[str, Any]]:
    """The training or search of a method, if it has one, and the keys of `EvalConfig` that name its arms."""
    config, run = place.config, place.directory / "run"
    match method:
        case UnchangedMethod():
            return [], {"arms": ["no_finetuning"]}
        case InstructionMethod():
            assert place.variant is not None  # a cell is of one instruction
            instruction = config.tasks[place.task].instructions[place.variant]
            return [], {"arms": [f"instruction_{place.variant}"], "instructions": {place.variant: instruction}}
        case RLHFMethod():
            return _trained_target(place, [method.settings], run)
        case SoftPromptMethod(before="target"):
            return _trained_target(place, [method.sections, method.settings], run)
        case SoftPromptMethod():
            return _trained_prompter(place, [method.sections, method.settings], run)
        case TargetAdapterMethod():
            return _adapted_target(place, method, run)
        case RivalMethod():
            rival = rival_sections(
                config,
                place.name,
                target=place.target,
                task=place.task,
                method=method,
                calls=_target_calls(place, method),
                seed=place.seed,
                out=run,
            )
            found = {"arms": ["instruction_found"], "instruction_files": {"found": str(run / "instruction.txt")}}
            return [Job("rival", rival, place.directory / "rival.yaml", run / "rival.json")], found
        case TrainMethod():
            return _trained_prompter(place, [method.settings], run)
        case _:
            return [], _untrained_arms(place, method)


def _trained_prompter(
    place: Place, settings: Sequence[Mapping[str, Any]], run: Path
) -> tuple[list[Job], dict[str, Any]]:
    training = _training(place, settings, place.variant, run)
    return [Job("train", training, place.directory / "train.yaml", run / "model")], _trained_arms(place, training)


def _trained_target(place: Place, settings: Sequence[Mapping[str, Any]], run: Path) -> tuple[list[Job], dict[str, Any]]:
    training = rlhf_sections(
        place.config,
        place.name,
        target=place.target,
        task=place.task,
        settings=settings,
        seed=place.seed,
        out=run,
    )
    arms = {"arms": ["oracle"], "oracle": model_sections(place.config.targets[place.target], str(run / "model"))}
    return [Job("rlhf", training, place.directory / "rlhf.yaml", run / "model")], arms


def _adapted_target(place: Place, method: TargetAdapterMethod, run: Path) -> tuple[list[Job], dict[str, Any]]:
    """A prompter on the target's own weights: the target is the model below its LoRA, and so is ρ_sft."""
    model = place.config.targets[place.target]
    training = train_sections(
        place.config,
        place.name,
        policy=model | {"adapter": {"kind": "lora"}},
        target=place.target,
        task=place.task,
        settings=[{"target": "policy"}, method.settings],
        seed=place.seed,
        out=run,
    )
    arms = {
        "arms": ["align_pro"],
        "prompter": model_sections(model, str(run / "model")),
        "reference": model_sections(model, model["path"]),
        "target": "prompter",
        **_written_as(training),
    }
    return [Job("train", training, place.directory / "train.yaml", run / "model")], arms


def _untrained_arms(place: Place, method: Method) -> dict[str, Any]:
    """What is made of the prompter before training."""
    reference = {"reference": model_sections(_policy(place), start_of(place.config, place.variant))}
    match method:
        case PriorMethod():
            return reference | {"arms": ["sft_prompter"]}
        case GibbsMethod():
            counts = {"gibbs_candidates": list(method.candidates), "arms": list(gibbs_arms(method.candidates))}
            return reference | counts
        case BestOfMethod():
            arms = [f"best_of_{count}" for count in sorted(set(method.candidates))]
            return reference | {"best_of": list(method.candidates), "arms": arms}
        case _:
            raise TypeError(f"{type(method).__name__} is no method of a prompter before training")


def _trained_arms(place: Place, training: TrainConfig) -> dict[str, Any]:
    policy = _policy(place)
    return {
        "reference": model_sections(policy, start_of(place.config, place.variant)),
        "arms": ["align_pro"],
        "prompter": model_sections(policy, str(training.run.out / "model")),
        **_written_as(training),
    }


def _written_as(training: TrainConfig) -> dict[str, Any]:
    """How a trained prompter is asked and sampled: with the meta-prompt and the temperature of its training."""
    return {
        "prompting": training.prompting.model_dump(mode="json"),
        "rewrite": training.rollout.rewrite.model_dump(mode="json"),
    }


def _policy(place: Place) -> dict[str, Any]:
    assert place.variant is not None  # a cell is of one prompter
    return place.config.prompters[place.variant].policy


def start_of(config: ExperimentConfig, prompter: str | None) -> str:
    """The directory or name of the model that a prompter's trainings start from, ρ_sft."""
    assert prompter is not None  # it is asked for methods that need one
    if config.prompters[prompter].prior is not None:
        return str(config.out / "priors" / prompter / "run" / "model")
    start: str = config.prompters[prompter].policy["path"]
    return start


def _training(place: Place, settings: Sequence[Mapping[str, Any]], prompter: str | None, run: Path) -> TrainConfig:
    assert prompter is not None  # a cell is of one prompter
    return train_sections(
        place.config,
        place.name,
        policy=place.config.prompters[prompter].policy | {"path": start_of(place.config, prompter)},
        target=place.target,
        task=place.task,
        settings=settings,
        seed=place.seed,
        out=run,
    )


def _target_calls(place: Place, method: RivalMethod) -> int:
    """How many responses of the target a rival may draw: those that a training draws, if it names one."""
    if isinstance(method.target_calls, int):
        return method.target_calls
    named = place.config.methods[method.target_calls]
    assert isinstance(named, TrainMethod) and needs_prompter(named)  # the configuration checks it
    training = _training(place, [named.settings], next(iter(place.config.prompters)), place.directory / "run")
    return training.run.steps * calls_per_step(training)


def calls_per_step(training: TrainConfig) -> int:
    """Responses of the target in a step of a training; those that the guard `refusal_kept` needs as if no prompt came again."""
    rollout = training.rollout
    answers = rollout.rewrites_per_prompt * rollout.responses_per_rewrite + training.reward.keeps_refusals
    return rollout.prompts_per_step * answers
