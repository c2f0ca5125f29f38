"""`alignpro eval` with a mixture of targets: the same comparison on each of them, and one summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alignpro.config import (
    ConfigSource,
    EvalConfig,
    ModelConfig,
    RemoteTargetConfig,
    TargetEndpointConfig,
    TargetPart,
    dump_config,
    load_config,
    resolve_config,
    target_endpoints,
    target_parts,
)
from alignpro.config.endpoints import changes_no_answer
from alignpro.errors import ConfigError
from alignpro.evaluation.evaluate import evaluate, evaluated_as_trained, prepare_directory
from alignpro.evaluation.results import Evaluation
from alignpro.targets.servers import open_servers
from alignpro.training.durability import disk_errors, replace_text
from alignpro.training.resume import differences


def evaluate_targets(config: ConfigSource[EvalConfig]) -> dict[str, Evaluation]:
    """Evaluate on each target of a configuration; with several, into a directory each, and write their summaries as one.

    A call that is repeated after an interruption goes on with the targets that it has not finished. All count against one
    budget.

    Returns:
        Name of the target → its evaluation, of those that this call has evaluated.

    Raises:
        AlignProError: As `evaluate`.
    """
    config = resolve_config(EvalConfig, config)
    parts = target_parts(config.target)
    if len(parts) == 1:
        return {parts[0].name: evaluate(config)}
    prepare_directory(config.out, "summary.json")
    config = evaluated_as_trained(config)
    results, summary = dict[str, Evaluation](), dict[str, Any]()
    with open_servers(
        config, target_endpoints(config.target), config.out, config.respond, config.reward_endpoints
    ) as servers:
        for part in parts:
            own = config.model_copy(update={"target": _alone(part), "out": config.out / part.name})
            if (finished := _finished(own)) is None:
                results[part.name] = evaluate(own, servers=servers)
                finished = results[part.name].as_dict()
            summary[part.name] = finished
    with disk_errors(str(config.out), "make room, then evaluate again"):
        replace_text(config.out / "summary.json", json.dumps({"targets": summary}, indent=1, ensure_ascii=False))
    return results


def _finished(config: EvalConfig) -> dict[str, Any] | None:
    """The summary of an evaluation that an earlier call has finished with the same configuration; None if there is none."""
    summary, used = config.out / "summary.json", config.out / "config.yaml"
    if not (summary.is_file() and used.is_file() and _says_the_same(used, config)):
        return None  # `evaluate` says what is in the way
    content: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return content


def _says_the_same(used: Path, config: EvalConfig) -> bool:
    """Whether a recorded configuration is this one, but for that on which no answer depends, such as the budget."""
    if used.read_text(encoding="utf-8") == dump_config(config):
        return True
    try:
        recorded = load_config(EvalConfig, [str(used)])
    except ConfigError:
        return False
    found = differences(recorded.model_dump(mode="json"), config.model_dump(mode="json"))
    return all(changes_no_answer(key) for key, *_ in found)


def _alone(part: TargetPart) -> ModelConfig | RemoteTargetConfig:
    """A target of a mixture as the only one."""
    if isinstance(part.source, TargetEndpointConfig):
        return RemoteTargetConfig(endpoint=part.source)
    assert isinstance(part.source, ModelConfig)  # a mixture has no names
    return ModelConfig(**{name: getattr(part.source, name) for name in ModelConfig.model_fields})
