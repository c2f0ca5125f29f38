"""Evaluations and training runs that lie in directories, as `alignpro report` compares them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from alignpro.config.fingerprint import fingerprint_of_run
from alignpro.environments.self_reward import TARGET_CALLS
from alignpro.errors import DataError
from alignpro.evaluation.comparison import Record
from alignpro.evaluation.comparison_results import Cost
from alignpro.evaluation.labels import method_label
from alignpro.evaluation.results import SampleRow
from alignpro.evaluation.rewards_file import REWARDS_FILE, EvaluationRewards, read_rewards
from alignpro.targets.server_metrics import AWAITED
from alignpro.training.loggers.jsonl import read_rows

RECORD_FILE = "record.json"
"""Beside rewards.json, where an experiment says what was evaluated: ``task``, ``prompter`` (if there is one), ``target``,
``seed``, and ``methods``: arm → ``method``, ``label`` (if it is not that of the arm) and ``cost``."""
TRAINED = {"align_pro": "prompter", "oracle": "oracle"}
"""Arm whose model is trained → the key of the evaluation's configuration that names it."""
_CHAIN = ("rewrites_per_prompt", "responses_per_rewrite")
"""Samples of a prompt in the training of a prompter; in that of an oracle, ``responses_per_prompt``."""


@dataclass(frozen=True)
class EvaluatedDirectory:
    """The directory of one evaluation."""

    path: Path
    rewards: EvaluationRewards

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its resolved configuration; empty if it is not there."""
        return _yaml(self.path / "config.yaml")

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """What an experiment says of it.

        Raises:
            DataError: The file is damaged or lacks a key.
        """
        file = self.path / RECORD_FILE
        if not file.is_file():
            return None
        content = read_object(file)
        missing = [key for key in ("task", "target", "seed", "methods") if key not in content]
        if missing:
            raise DataError(f"{file}: lacks {', '.join(missing)}")
        unknown = [arm for arm in self.rewards.arms if "method" not in content["methods"].get(arm, {})]
        if unknown:
            raise DataError(f"{file}: methods.{unknown[0]} lacks its method: {REWARDS_FILE} beside it has this arm")
        return content

    @property
    def rows(self) -> list[SampleRow]:
        """Its samples; none if the file is not there.

        Raises:
            DataError: The file is damaged.
        """
        file = self.path / "samples.jsonl"
        if not file.is_file():
            return []
        rows: list[SampleRow] = []
        with file.open(encoding="utf-8", errors="surrogatepass") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise DataError(
                        f"{file}:{number}: cannot be read: {error}; remove the file to report without samples, or evaluate again"
                    ) from error
        return rows

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of its summary.json; empty if it is not there.

        Raises:
            DataError: The file is damaged.
        """
        file = self.path / "summary.json"
        return read_object(file) if file.is_file() else {}

    def run(self, arm: str) -> Path | None:
        """The run directory that trained the model of an arm, if it is there."""
        named = self.config.get(TRAINED.get(arm, "")) or {}
        path = Path(named.get("path", ""))
        return path.parent if path.name == "model" and (path.parent / "config.yaml").is_file() else None


def find_evaluations(directories: Iterable[Path]) -> list[EvaluatedDirectory]:
    """The evaluations in directories: each is one itself, or holds some at any depth; in the order of their paths.

    Raises:
        DataError: A rewards.json is damaged.
    """
    files = [
        file
        for directory in directories
        for file in ([directory / REWARDS_FILE] if (directory / REWARDS_FILE).is_file() else _below(directory))
    ]
    return [EvaluatedDirectory(file.parent, read_rewards(file)) for file in dict.fromkeys(files)]


def records_of(evaluations: Sequence[EvaluatedDirectory]) -> tuple[list[Record], list[str]]:
    """One record per arm of each evaluation, and notes on those that were left out.

    Trained arms whose configurations differ in more than seed and place are methods of their own, named by the directory.
    What is not trained and was evaluated more than once with the same seed is taken once.
    """
    names: dict[str, dict[str, str]] = {}
    for each in evaluations:
        for arm in each.rewards.arms:
            if each.record is None and (run := each.run(arm)) is not None:
                of_arm = names.setdefault(arm, {})
                of_arm.setdefault(
                    fingerprint_of_run(_yaml(run / "config.yaml")),
                    run.name if run.name not in of_arm.values() else str(run),
                )
    records: dict[tuple[str, str | None, str, str, int], Record] = {}
    notes = []
    for each in evaluations:
        for arm in each.rewards.arms:
            record = _recorded(each, arm) if each.record else _record(each, arm, names.get(arm, {}))
            key = (record.task, record.prompter, record.target, record.method, record.seed)
            earlier = records.get(key)
            if earlier is None:
                records[key] = record
            elif arm in TRAINED:
                raise DataError(
                    f"{record.origin} and {earlier.origin} are both {arm} with seed {record.seed}; leave one out"
                )
            elif not _same(earlier.rewards, record.rewards):
                notes.append(
                    f"{record.label or method_label(arm)} was evaluated more than once with seed {record.seed}; that of "
                    f"{earlier.origin} is taken, not that of {record.origin}."
                )
    return list(records.values()), notes


def curves_of(directories: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Name of a run directory → its metrics, of those that have any."""
    curves = {}
    for directory in directories:
        rows = read_rows(directory / "metrics.jsonl")
        if rows:
            name = directory.name if directory.name not in curves else str(directory)
            curves[name] = rows
    return curves


def runs_of(evaluations: Sequence[EvaluatedDirectory]) -> list[Path]:
    """The run directories that trained the compared models."""
    found = [each.run(arm) for each in evaluations for arm in each.rewards.arms]
    return list(dict.fromkeys(run for run in found if run is not None))


def interleaved_rows(evaluations: Sequence[EvaluatedDirectory]) -> list[SampleRow]:
    """The samples of all evaluations in turn, so that the first of them come from each."""
    turns = zip_longest(*(each.rows for each in evaluations))
    return [row for row in chain.from_iterable(turns) if row is not None]


def _below(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob(REWARDS_FILE) if not any(p.startswith(".") for p in file.parts[-3:]))


def _recorded(each: EvaluatedDirectory, arm: str) -> Record:
    assert each.record is not None  # because it is asked of directories that have one
    record, method = each.record, each.record["methods"][arm]
    cost = {key: method.get("cost", {}).get(key) for key in ("target_calls", "tokens", "seconds")}
    return Record(
        task=record["task"],
        prompter=record.get("prompter"),
        target=record["target"],
        method=method["method"],
        seed=record["seed"],
        rewards=_only(each.rewards, arm),
        cost=Cost(**cost),
        label=method.get("label", ""),
        origin=str(each.path),
    )


def _record(each: EvaluatedDirectory, arm: str, names: Mapping[str, str]) -> Record:
    config, run = each.config, each.run(arm)
    method, label = arm, ""
    if len(names) > 1 and run is not None:
        name = names[fingerprint_of_run(_yaml(run / "config.yaml"))]
        method, label = f"{arm}: {name}", f"{method_label(arm)} ({name})"
    trained = _yaml(run / "config.yaml") if run is not None else {}
    prompter = _name(config.get("reference") or trained.get("policy") or config.get("prompter"))
    return Record(
        task=config.get("title", each.path.name),
        prompter=None if arm in ("no_finetuning", "oracle") or arm.startswith("instruction") else prompter,
        target=_name(config.get("target")) or "target",
        method=method,
        seed=trained.get("run", {}).get("seed", each.rewards.seed),
        rewards=_only(each.rewards, arm),
        cost=Cost() if run is None else training_cost(run, trained),
        label=label,
        origin=str(each.path),
    )


def _same(a: EvaluationRewards, b: EvaluationRewards) -> bool:
    """Whether the rewards of two evaluations of one arm are equal."""
    (first,), (second,) = a.arms.values(), b.arms.values()
    return list(a.prompts) == list(b.prompts) and np.array_equal(first.raw, second.raw)


def _only(rewards: EvaluationRewards, arm: str) -> EvaluationRewards:
    return EvaluationRewards(rewards.prompts, rewards.clusters, {arm: rewards.arms[arm]}, rewards.seed, rewards.reward)


def training_cost(run: Path, config: Mapping[str, Any]) -> Cost:
    """What a training run took, from its metrics: responses of the target to its rollouts, decoded tokens, seconds of its phases.

    With the guard `refusal_kept`, each prompt of a step has a response as it is beside those to its rewrites; it is counted again
    in a later epoch, in which it is not asked again.

    Args:
        run: The run directory.
        config: The configuration of `alignpro train` or `alignpro rlhf`.
    """
    rows = read_rows(run / "metrics.jsonl")
    rollout = config.get("rollout", {})
    samples = ("responses_per_prompt",) if "responses_per_prompt" in rollout else _CHAIN
    each = [rollout.get(key) for key in ("prompts_per_step", *samples)]
    steps = sum("reward/mean" in row for row in rows)  # the rows of evaluations have other metrics
    calls = float(steps * np.prod(each)) if rows and all(isinstance(number, int) for number in each) else None
    if (
        rows and config.get("self_reward") and isinstance(each[0], int)
    ):  # candidates that were not trained on were answered, too
        calls = each[0] * sum(row.get(TARGET_CALLS, 0.0) for row in rows)
    if calls and samples == _CHAIN and _keeps_refusals(config):
        calls += steps * each[0]
    tokens = [row["engine/computed/decode"] for row in rows if "engine/computed/decode" in row]
    seconds = sum(value for row in rows for key, value in row.items() if key.startswith("seconds/") and key != AWAITED)
    return Cost(calls, float(sum(tokens)) if tokens else None, float(seconds) if rows else None)


def _keeps_refusals(config: Mapping[str, Any]) -> bool:
    return any(guard.get("kind") == "refusal_kept" for guard in config.get("reward", {}).get("guards") or ())


def _name(model: Any) -> str | None:
    """A model's name: its directory, or the run directory if it is a run's ``model/``."""
    if not isinstance(model, dict):
        return model if isinstance(model, str) else None
    if "path" in model:
        path = Path(model["path"])
        return path.parent.name if path.name == "model" and path.parent.name else path.name
    endpoint = model.get("endpoint")
    return endpoint.get("model") if isinstance(endpoint, dict) else None


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object")
    return content
