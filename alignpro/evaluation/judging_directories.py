"""`alignpro judge`: judges compare the arms of finished evaluations, from the responses that lie in their directories."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from alignpro.config import JudgeConfig, SamplingConfig, validate_config
from alignpro.errors import ConfigError, DataError
from alignpro.evaluation.evaluated import EvaluatedDirectory, find_evaluations
from alignpro.evaluation.judges import Judge, LocalJudge
from alignpro.evaluation.judging import Judgement, judge_arms, judging_rubric
from alignpro.models.progress_bars import without_progress_bars
from alignpro.targets.servers import open_servers
from alignpro.training.durability import disk_errors, replace_text

logger = logging.getLogger(__name__)

JUDGEMENTS_FILE = "judgements.jsonl"
"""The verdicts of an evaluation's judges, pair by pair."""


@without_progress_bars()
def judge_directories(
    directories: Sequence[Path], config: JudgeConfig | None = None, *, force: bool = False
) -> dict[Path, Judgement]:
    """Judge finished evaluations; each gets a ``judgements.jsonl``, and ``judge`` in its ``summary.json``.

    What judges behind servers were asked is in the ledger of each evaluation, so that an interrupted call continues.

    Args:
        directories: Of evaluations, or of anything with evaluations below.
        config: The judges; by default the section ``judge`` of each evaluation's own configuration, if it sends no secret, runs
            no code, and names no rubric or ledger.
        force: Whether to judge what has been judged before.

    Raises:
        DataError: There is no evaluation, one has been judged, or its files do not fit each other.
        ConfigError: There is no section ``judge``, or the rubric cannot be used.
        AlignProError: As `judge_arms`; evaluations before the failing one keep what was said of them.
    """
    evaluations = find_evaluations(directories)
    if not evaluations:
        raise DataError(f"{directories[0]}: holds no evaluation (rewards.json, from `alignpro eval`)")
    jobs = [(each, config or _own_config(each)) for each in evaluations]
    for each, job in jobs:
        judging_rubric(job.judge)
        if not force and each.summary.get("judge", {}).get("comparisons"):
            raise DataError(f"{each.path}: has been judged: see summary.json there, or judge it again with --force")
    loaded: dict[str, Judge] = {}
    judgements = {}
    for each, job in jobs:
        if config is None:  # another evaluation may call another judge the same
            loaded.clear()
        with open_servers(job, [], each.path, SamplingConfig(), job.judge.endpoints) as servers:
            judgement = judge_arms(
                job.judge, each.rows, each.rewards, servers, job.engine, where=str(each.path), opened=loaded
            )
        loaded = {name: judge for name, judge in loaded.items() if isinstance(judge, LocalJudge)}
        write_judgement(each.path, judgement)
        summary = each.summary | {"judge": judgement.as_dict()}
        with disk_errors(str(each.path), "make room, then judge again"):
            replace_text(each.path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
        judgements[each.path] = judgement
    return judgements


def write_judgement(directory: Path, judgement: Judgement) -> None:
    """Write the verdicts, pair by pair.

    Raises:
        CheckpointError: The file cannot be written.
    """
    lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in judgement.rows]
    with disk_errors(str(directory), "make room, then judge again"):
        replace_text(directory / JUDGEMENTS_FILE, "".join(lines))


def _own_config(each: EvaluatedDirectory) -> JudgeConfig:
    """The judges that an evaluation's own configuration names.

    Raises:
        ConfigError: It names none, or they need more trust than a directory has that may come from someone else.
    """
    if not each.config.get("judge"):
        raise ConfigError(
            f"{each.path}: its config.yaml has no section `judge`, which says who judges: give one with --config judge.yaml"
        )
    kept = {key: each.config[key] for key in JudgeConfig.model_fields if key in each.config}
    config = validate_config(JudgeConfig, kept)
    if needs := _needed_trust(config):
        raise ConfigError(
            f"{each.path}: its config.yaml {needs}; if you trust it, copy the section `judge` and what it needs to a file of "
            "yours, and give that with --config"
        )
    return config


def _needed_trust(config: JudgeConfig) -> str:
    """What a configuration would do besides asking: send secrets, run code, read or write a file; empty if nothing."""
    for judge in config.judge.judges:
        if judge.endpoint is not None and judge.endpoint.variables:
            return f"sends {', '.join(f'${name}' for name in judge.endpoint.variables)} to {judge.endpoint.base_url}"
        if judge.model is not None and (judge.model.trust_remote_code or "/" in judge.model.attention):
            return f"lets code run that comes with the model {judge.model.path}"
    if config.judge.rubric is not None:
        return f"reads the rubric {config.judge.rubric}"
    return "" if config.ledger is None else f"writes the ledger {config.ledger}"
