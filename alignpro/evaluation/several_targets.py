"""`alignpro eval` with a mixture of targets: the same comparison on each of them, and one summary."""

from __future__ import annotations

import json

from alignpro.config import (
    ConfigSource,
    EvalConfig,
    ModelConfig,
    RemoteTargetConfig,
    TargetEndpointConfig,
    TargetPart,
    resolve_config,
    target_endpoints,
    target_parts,
)
from alignpro.evaluation.evaluate import evaluate, prepare_directory
from alignpro.evaluation.results import Evaluation
from alignpro.targets.servers import open_servers
from alignpro.training.durability import disk_errors, replace_text


def evaluate_targets(config: ConfigSource[EvalConfig]) -> dict[str, Evaluation]:
    """Evaluate on each target of a configuration; with several, into a directory each, and write their summaries as one.

    A target that has been evaluated by an earlier call is an error of `evaluate`, as in a directory of its own. All count
    against one budget.

    Returns:
        Name of the target → its evaluation.

    Raises:
        AlignProError: As `evaluate`.
    """
    config = resolve_config(EvalConfig, config)
    parts = target_parts(config.target)
    if len(parts) == 1:
        return {parts[0].name: evaluate(config)}
    prepare_directory(config.out, "summary.json")
    results = {}
    with open_servers(
        config, target_endpoints(config.target), config.out, config.respond, config.reward_endpoints
    ) as servers:
        for part in parts:
            own = config.model_copy(update={"target": _alone(part), "out": config.out / part.name})
            results[part.name] = evaluate(own, servers=servers)
    summary = {name: result.as_dict() for name, result in results.items()}
    with disk_errors(str(config.out), "make room, then evaluate again"):
        replace_text(config.out / "summary.json", json.dumps({"targets": summary}, indent=1, ensure_ascii=False))
    return results


def _alone(part: TargetPart) -> ModelConfig | RemoteTargetConfig:
    """A target of a mixture as the only one."""
    if isinstance(part.source, TargetEndpointConfig):
        return RemoteTargetConfig(endpoint=part.source)
    assert isinstance(part.source, ModelConfig)  # a mixture has no names
    return ModelConfig(**{name: getattr(part.source, name) for name in ModelConfig.model_fields})
