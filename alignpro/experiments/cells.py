"""The cells of an experiment: which there are, what each runs, and where its results lie.

out/priors/PROMPTER/                                       the prompter that all methods start from
out/cells/TASK/TARGET/METHOD[/PROMPTER or INSTRUCTION][/s_STRENGTH]/seed_N/
    train.yaml or rlhf.yaml, run/                          the training: configuration, run directory
    eval.yaml, evaluation/                                 the evaluation; its summary.json marks the cell as done
    log.txt                                                what the commands printed
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from alignpro.config import (
    DialMethod,
    EvalConfig,
    ExperimentConfig,
    GibbsMethod,
    InstructionMethod,
    Method,
    PriorMethod,
    RLHFMethod,
    TrainMethod,
    UnchangedMethod,
    needs_prompter,
)
from alignpro.config.jobs import dial_arms, gibbs_arms
from alignpro.experiments.sections import (
    eval_sections,
    model_sections,
    prior_sections,
    rlhf_sections,
    train_sections,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A command of `alignpro` with its configuration."""

    command: str
    """``sft``, ``train``, ``rlhf`` or ``eval``."""
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
    needs: Cell | None = None
    """What has to be done before: the preparation, or of a prompter at another strength its training."""

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
    used = any(needs_prompter(method) for method in config.methods.values())
    found = list(priors.values()) if used else []
    methods = sorted(config.methods.items(), key=lambda item: isinstance(item[1], DialMethod))  # after what it needs
    for seed in config.seeds:
        for task in config.tasks:
            for target in config.targets:
                for name, method in methods:
                    if not isinstance(method, DialMethod):
                        found += _of_method(config, name, method, task, target, seed, priors)
                        continue
                    where = (method.of, task, target, seed)
                    for cell in [c for c in found if (c.method, c.task, c.target, c.seed) == where]:
                        found += _of_dial(config.out, name, method, cell)
    return found


def _prior(config: ExperimentConfig, name: str) -> Cell:
    directory = config.out / "priors" / name
    sections = prior_sections(config, name, directory / "run")
    job = Job("sft", sections, directory / "sft.yaml", directory / "run" / "model")
    return Cell(directory, f"priors/{name}", (job,), method="prior", prompter=name)


def _of_method(
    config: ExperimentConfig,
    name: str,
    method: Method,
    task: str,
    target: str,
    seed: int,
    priors: dict[str, Cell],
) -> Iterator[Cell]:
    if isinstance(method, InstructionMethod):
        variants: list[str | None] = list(config.tasks[task].instructions)
    elif needs_prompter(method):
        variants = list(config.prompters)
    else:
        variants = [None]
    if isinstance(method, RLHFMethod) and "path" not in config.targets[target]:
        return  # it is behind a server, or several targets: what cannot be trained has no oracle
    for variant in variants:
        parts = ["cells", task, target, name, *([variant] if variant else []), f"seed_{seed}"]
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
            needs=priors.get(prompter) if prompter else None,
        )


def _of_dial(out: Path, name: str, method: DialMethod, training: Cell) -> Iterator[Cell]:
    """The cells of a trained prompter at each strength: they are evaluated as the trained one is."""
    evaluation = training.jobs[-1].config
    assert isinstance(evaluation, EvalConfig)  # the last job of each cell that is compared
    for arm, strength in dial_arms(method.strengths).items():
        parts = ["cells", training.task, training.target, name, training.prompter or "", f"s_{strength:g}"]
        path = "/".join([*parts, f"seed_{training.seed}"])
        directory = out / path
        results = directory / "evaluation"
        own = evaluation.model_copy(update={"out": results, "arms": [arm], "strengths": [strength]})
        job = Job("eval", own, directory / "eval.yaml", results / "summary.json")
        yield replace(training, directory=directory, name=path, jobs=(job,), method=name, needs=training)


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
