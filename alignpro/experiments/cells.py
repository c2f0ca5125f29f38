"""The cells of an experiment: which there are, what each runs, and where its results lie.

out/priors/PROMPTER/                                       the prompter that all methods start from
out/cells/TASK/TARGET/METHOD[/PROMPTER or INSTRUCTION][/POINT of a sweep]/seed_N/
    train.yaml, rlhf.yaml or rival.yaml, run/              the training or search: configuration, its directory
    eval.yaml, evaluation/                                 the evaluation; its summary.json marks the cell as done
    log.txt                                                what the commands printed
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignpro.config import (
    BestOfMethod,
    ExperimentConfig,
    GibbsMethod,
    InstructionMethod,
    Method,
    PriorMethod,
    RivalMethod,
    RLHFMethod,
    SweepConfig,
    TrainMethod,
    UnchangedMethod,
    needs_prompter,
)
from alignpro.config.jobs import gibbs_arms
from alignpro.experiments.points import Point, points_of
from alignpro.experiments.sections import (
    eval_sections,
    model_sections,
    prior_sections,
    rival_sections,
    rlhf_sections,
    train_sections,
)

logger = logging.getLogger(__name__)


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
class Cell:
    """One entry of the experiment's table, or the preparation of a prompter."""

    directory: Path
    name: str
    """Its directory from that of the experiment."""
    jobs: tuple[Job, ...]
    method: str
    task: str = ""
    target: str = ""
    prompter: str | None = None
    """None if the method has none: the cell then counts for all prompters."""
    seed: int = 0
    point: Point | None = None
    """Of a sweep; None if the method is not swept."""
    needs: Cell | None = None
    """The preparation that has to be done before."""

    @property
    def done(self) -> bool:
        """Whether its results are there: an evaluation stays done if the model that it evaluated is gone."""
        return self.jobs[-1].done

    @property
    def kind(self) -> str:
        """Cells of one kind take about the same time."""
        return self.method if self.task else "priors"


def cells(config: ExperimentConfig) -> list[Cell]:
    """All cells in the order in which they run: preparations first, then seed by seed, so that early results are broad.

    Raises:
        ConfigError: The configuration of a cell is invalid; the message names the cell.
    """
    priors = {name: _prior(config, name) for name, each in config.prompters.items() if each.prior is not None}
    points = points_of(config) if isinstance(config, SweepConfig) else {}
    used = any(needs_prompter(method) for method in config.methods.values())
    found = list(priors.values()) if used else []
    for seed in config.seeds:
        for task in config.tasks:
            for target in config.targets:
                for name in config.methods:
                    for point in points.get(name, (None,)):
                        found += _of_method(config, name, task, target, seed, priors, point)
    return found


def _prior(config: ExperimentConfig, name: str) -> Cell:
    directory = config.out / "priors" / name
    sections = prior_sections(config, name, directory / "run")
    job = Job("sft", sections, directory / "sft.yaml", directory / "run" / "model")
    return Cell(directory, f"priors/{name}", (job,), method="prior", prompter=name)


def _of_method(
    experiment: ExperimentConfig,
    name: str,
    task: str,
    target: str,
    seed: int,
    priors: dict[str, Cell],
    point: Point | None,
) -> Iterator[Cell]:
    config = experiment if point is None else point.config
    method = config.methods[name]
    if isinstance(method, InstructionMethod):
        variants: list[str | None] = list(config.tasks[task].instructions)
    elif needs_prompter(method):
        variants = list(config.prompters)
    else:
        variants = [None]
    if isinstance(method, RLHFMethod) and "path" not in config.targets[target]:
        return  # it is behind a server, or several targets: what cannot be trained has no oracle
    for variant in variants:
        parts = [
            "cells",
            task,
            target,
            name,
            *([variant] if variant else []),
            *([point.name] if point else []),
            f"seed_{seed}",
        ]
        directory = config.out.joinpath(*parts)
        prompter = variant if needs_prompter(method) else None
        yield Cell(
            directory,
            "/".join(parts),
            tuple(_jobs(config, method, "/".join(parts), directory, task, target, seed, variant)),
            method=name,
            task=task,
            target=target,
            prompter=prompter,
            seed=seed,
            point=point,
            needs=priors.get(prompter) if prompter else None,
        )


def _jobs(
    config: ExperimentConfig,
    method: Method,
    name: str,
    directory: Path,
    task: str,
    target: str,
    seed: int,
    variant: str | None,
) -> Iterator[Job]:
    arms: dict[str, Any]
    run = directory / "run"
    match method:
        case UnchangedMethod():
            arms = {"arms": ["no_finetuning"]}
        case InstructionMethod():
            assert variant is not None  # a cell is of one instruction
            instruction = config.tasks[task].instructions[variant]
            arms = {"arms": [f"instruction_{variant}"], "instructions": {variant: instruction}}
        case RLHFMethod():
            oracle = rlhf_sections(config, name, target=target, task=task, settings=method.settings, seed=seed, out=run)
            yield Job("rlhf", oracle, directory / "rlhf.yaml", run / "model")
            arms = {"arms": ["oracle"], "oracle": model_sections(config.targets[target], str(run / "model"))}
        case RivalMethod():
            calls = _target_calls(config, method, name, target, task, seed)
            rival = rival_sections(
                config, name, target=target, task=task, method=method, calls=calls, seed=seed, out=run
            )
            yield Job("rival", rival, directory / "rival.yaml", run / "rival.json")
            arms = {"arms": ["instruction_found"], "instruction_files": {"found": str(run / "instruction.txt")}}
        case _:
            assert variant is not None  # a cell is of one prompter
            policy = config.prompters[variant].policy
            prepared = config.prompters[variant].prior is not None
            start = str(config.out / "priors" / variant / "run" / "model") if prepared else policy["path"]
            arms = {"reference": model_sections(policy, start)}
            if isinstance(method, PriorMethod):
                arms["arms"] = ["sft_prompter"]
            elif isinstance(method, GibbsMethod):
                arms["arms"] = list(gibbs_arms(method.candidates))
                arms["gibbs_candidates"] = list(method.candidates)
            elif isinstance(method, BestOfMethod):
                arms["best_of"] = list(method.candidates)
                arms["arms"] = [f"best_of_{count}" for count in sorted(set(method.candidates))]
            else:
                assert isinstance(method, TrainMethod)  # the last kind
                training = train_sections(
                    config,
                    name,
                    prompter=variant,
                    start=start,
                    target=target,
                    task=task,
                    settings=method.settings,
                    seed=seed,
                    out=run,
                )
                yield Job("train", training, directory / "train.yaml", run / "model")
                arms |= {"arms": ["align_pro"], "prompter": model_sections(policy, str(run / "model"))}
    evaluation = eval_sections(
        config, name, target=target, task=task, seed=seed, out=directory / "evaluation", arms=arms
    )
    yield Job("eval", evaluation, directory / "eval.yaml", directory / "evaluation" / "summary.json")


def _target_calls(config: ExperimentConfig, method: RivalMethod, where: str, target: str, task: str, seed: int) -> int:
    """How many responses of the target a rival may draw: those that a training draws, if it names one."""
    if isinstance(method.target_calls, int):
        return method.target_calls
    named = config.methods[method.target_calls]
    assert isinstance(named, TrainMethod)  # the configuration checks it
    prompter, each = next(iter(config.prompters.items()))
    training = train_sections(
        config,
        where,
        prompter=prompter,
        start=each.policy["path"],
        target=target,
        task=task,
        settings=named.settings,
        seed=seed,
        out=Path("run"),
    )
    rollout = training.rollout
    per_step = rollout.prompts_per_step * rollout.rewrites_per_prompt * rollout.responses_per_rewrite
    return training.run.steps * per_step
