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
from alignpro.evaluation.judging import Judgement, arm_pairs, judge_arms, judging_rubric
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

    What judges behind servers were asked is in the ledger of each evaluation, and evaluations that the same judges have judged
    are passed over: an interrupted call is continued by the same call. All is checked before anybody is asked.

    Args:
        directories: Of evaluations, or of anything with evaluations below.
        config: The judges; by default the section ``judge`` of each evaluation's own configuration, if it sends no secret, runs
            no code, and names no rubric or ledger.
        force: Whether to judge what has been judged before.

    Returns:
        Directory → what was said, of those that were judged by this call.

    Raises:
        DataError: There is no evaluation, one has been judged otherwise, it has nothing to compare, or its files do not fit each
            other; nothing has been asked.
        ConfigError: There is no section ``judge``, or the rubric cannot be used.
        AlignProError: As `judge_arms`; evaluations before the failing one keep what was said of them.
    """
    evaluations = find_evaluations(directories)
    if not evaluations:
        raise DataError(f"{directories[0]}: holds no evaluation (rewards.json, from `alignpro eval`)")
    jobs = [(each, config or _own_config(each)) for each in evaluations]
    left = [(each, job) for each, job in jobs if _is_to_be_judged(each, job, force=force)]
    if len(left) < len(jobs):
        logger.info("%d of %d evaluations are judged", len(jobs) - len(left), len(jobs))
    loaded: dict[str, Judge] = {}
    judgements = {}
    for each, job in left:
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


def _is_to_be_judged(each: EvaluatedDirectory, job: JudgeConfig, *, force: bool) -> bool:
    """Whether an evaluation, which is checked, has not been judged yet.

    Raises:
        DataError: It has been by other judges, by another rubric or on other pairs; or it cannot be judged.
        ConfigError: The rubric cannot be used.
    """
    rubric, pairs = judging_rubric(job.judge).version, arm_pairs(job.judge, each.rows, each.rewards, str(each.path))
    judged = each.summary.get("judge", {})
    if force or not judged.get("comparisons"):
        return True
    asked = [(own.label, made.arm, made.against, len(made.pairs)) for own in job.judge.judges for made in pairs]
    found = [
        (made["judge"], made["arm"], made["against"], made["pairs"] + made["errors"]) for made in judged["comparisons"]
    ]
    if sorted(asked) != sorted(found) or judged.get("rubric") != rubric:
        raise DataError(
            f"{each.path}: has been judged by {' and '.join(judged['judges'])}, with other judges, another rubric or other pairs "
            "than here: see summary.json there, or judge it again with --force"
        )
    logger.info("%s: has been judged (--force judges it again)", each.path)
    return False


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
