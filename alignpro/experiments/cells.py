"""The cells of an experiment: which there are, what each runs, and where its results lie.

out/priors/PROMPTER/                                       the prompter that all methods start from
out/cells/TASK/TARGET/METHOD[/PROMPTER or INSTRUCTION][/POINT of a sweep][/from_TARGET of the training][/s_STRENGTH]
    [/alpha_α/iteration_I]/seed_N/
    train.yaml, rlhf.yaml or rival.yaml, run/              the training or search: configuration, its directory
    eval.yaml, evaluation/                                 the evaluation; its summary.json marks the cell as done
    log.txt                                                what the commands printed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from alignpro.config import (
    DialMethod,
    EvalConfig,
    ExperimentConfig,
    InstructionMethod,
    Method,
    RLHFMethod,
    SelfRewardMethod,
    SweepConfig,
    TrainConfig,
    TrainMethod,
    needs_prompter,
)
from alignpro.config.jobs import dial_arms
from alignpro.errors import ConfigError
from alignpro.experiments.cell_jobs import Job, Place, cell_jobs, self_reward_jobs, transfer_jobs
from alignpro.experiments.points import Point, points_of
from alignpro.experiments.sections import is_mixture, prior_sections


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
    trained_on: str | None = None
    """The target on which the prompter was trained, if it is another one than that of the evaluation."""
    needs: Cell | None = None
    """What has to be done before: the preparation, the iteration before, or of a prompter elsewhere or at another strength its
    training."""
    iteration: int = 0
    """Of self-reward, from 1; 0 of other methods."""
    alpha: float = 1.0
    """α of self-reward; other methods learn from the reward alone."""

    @property
    def done(self) -> bool:
        """Whether its results are there: an evaluation stays done if the model that it evaluated is gone."""
        return self.jobs[-1].done

    @property
    def kind(self) -> str:
        """Cells of one kind take about the same time."""
        return "priors" if not self.task else self.method if self.trained_on is None else "transfer"

    @property
    def evaluated(self) -> bool:
        """Whether its results are of an evaluation."""
        return self.jobs[-1].command == "eval"


def cells(config: ExperimentConfig) -> list[Cell]:
    """All cells in the order in which they run: preparations first, then seed by seed, so that early results are broad.

    Raises:
        ConfigError: The configuration of a cell is invalid; the message names the cell.
    """
    priors = {name: _prior(config, name) for name, each in config.prompters.items() if each.prior is not None}
    points = points_of(config) if isinstance(config, SweepConfig) else {}
    used = any(needs_prompter(method) for method in config.methods.values())
    found = list(priors.values()) if used else []
    methods = sorted(config.methods.items(), key=lambda item: isinstance(item[1], DialMethod))  # after what it needs
    for seed in config.seeds:
        for task in config.tasks:
            for target in config.targets:
                for name, method in methods:
                    if not method.runs(task, target):
                        continue
                    if isinstance(method, DialMethod):
                        found += _of_dial(config, name, method, found, (method.of, task, target, seed))
                        continue
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
    """The cells of a method, each followed by those that evaluate its prompter on other targets."""
    config = experiment if point is None else point.config
    method = config.methods[name]
    alone = is_mixture(config, target) and bool(config.transfer_targets)
    if isinstance(method, RLHFMethod) and "path" not in config.targets[target]:
        return  # it is behind a server, or several targets: what cannot be trained has no oracle
    if alone and not (isinstance(method, TrainMethod) and method.transfer):
        return  # each of its targets is evaluated by itself, which is what transfer does
    if isinstance(method, SelfRewardMethod):
        for prompter in config.prompters:
            place = _place(config, name, task, target, seed, prompter, point)
            yield from _of_self_reward(place, name, method, point, priors.get(prompter))
        return
    transferred = config.transfer_targets if isinstance(method, TrainMethod) and method.transfer else []
    for variant in _variants(config, method, task):
        place = _place(config, name, task, target, seed, variant, point)
        needed = priors.get(variant or "") if needs_prompter(method) else None
        own = _cell(place, name, cell_jobs(place, method, evaluated=not alone), point, needed)
        yield own
        for other in transferred:
            if other != target:
                there = _place(config, name, task, other, seed, variant, point, origin=target)
                training = own.jobs[0].config
                assert isinstance(training, TrainConfig)  # only such a method is transferred
                yield _cell(there, name, transfer_jobs(there, training), point, own, trained_on=target)


def _of_self_reward(
    place: Place, name: str, method: SelfRewardMethod, point: Point | None, prior: Cell | None
) -> Iterator[Cell]:
    """The iterations for each α, each from the prompter of the one before; ``place`` is that of all of them."""
    for alpha in method.alphas:
        before: Cell | None = None
        for iteration in range(1, method.iterations + 1):
            *parts, seed = place.name.split("/")
            own = "/".join([*parts, f"alpha_{alpha:g}", f"iteration_{iteration}", seed])
            here = replace(place, name=own, directory=place.config.out / own)
            run = None if before is None else before.directory / "run"
            jobs = self_reward_jobs(here, method, alpha, iteration, run)
            before = replace(_cell(here, name, jobs, point, before or prior), iteration=iteration, alpha=alpha)
            yield before


def _of_dial(
    config: ExperimentConfig, name: str, method: DialMethod, found: list[Cell], of: tuple[str, str, str, int]
) -> list[Cell]:
    """The cells of trained prompters at each strength: they are evaluated as the trained ones are."""
    made = []
    for training in found:
        at = (training.method, training.task, training.target, training.seed)
        evaluation = training.jobs[-1].config
        if at != of or training.trained_on is not None or not isinstance(evaluation, EvalConfig):
            continue
        trained = training.jobs[0].config
        soft = isinstance(trained, TrainConfig) and trained.policy.adapter.kind == "soft_prompt"
        if soft and any(strength not in (0, 1) for strength in method.strengths):
            raise ConfigError(
                f"methods.{name}.of={method.of}: it trains a soft prompt ({training.name}), which the prompter before training "
                "does not have, so that both cannot be mixed: leave the dial out"
            )
        for arm, strength in dial_arms(method.strengths).items():
            parts = ["cells", training.task, training.target, name, training.prompter or ""]
            parts += [*([training.point.name] if training.point else []), f"s_{strength:g}", f"seed_{training.seed}"]
            directory = config.out.joinpath(*parts)
            results = directory / "evaluation"
            own = evaluation.model_copy(update={"out": results, "arms": [arm], "strengths": [strength]})
            job = Job("eval", own, directory / "eval.yaml", results / "summary.json")
            made.append(
                replace(training, directory=directory, name="/".join(parts), jobs=(job,), method=name, needs=training)
            )
    return made


def _place(
    config: ExperimentConfig,
    method: str,
    task: str,
    target: str,
    seed: int,
    variant: str | None,
    point: Point | None,
    *,
    origin: str | None = None,
) -> Place:
    """Where a cell stands; ``origin`` is the target of its training, if it is another one."""
    parts = ["cells", task, target, method]
    parts += [part for part in (variant, point and point.name, origin and f"from_{origin}") if part]
    name = "/".join([*parts, f"seed_{seed}"])
    return Place(config, name, config.out / name, task, target, seed, variant)


def _cell(
    place: Place,
    method: str,
    jobs: tuple[Job, ...],
    point: Point | None,
    needs: Cell | None,
    *,
    trained_on: str | None = None,
) -> Cell:
    return Cell(
        place.directory,
        place.name,
        jobs,
        method=method,
        task=place.task,
        target=place.target,
        prompter=place.variant if needs_prompter(place.config.methods[method]) else None,
        seed=place.seed,
        point=point,
        trained_on=trained_on,
        needs=needs,
    )


def _variants(config: ExperimentConfig, method: Method, task: str) -> list[str | None]:
    """The prompters or instructions of which a method has a cell each."""
    if isinstance(method, InstructionMethod):
        return list(config.tasks[task].instructions)
    return list(config.prompters) if needs_prompter(method) else [None]
