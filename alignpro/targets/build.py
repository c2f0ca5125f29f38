"""Build the target of a job from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from alignpro.config import (
    EndpointConfig,
    ModelConfig,
    PromptingConfig,
    SamplingConfig,
    TargetConfig,
    TargetEndpointConfig,
    TargetPart,
    target_parts,
)
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model, load_target
from alignpro.targets.base import Responder, Target
from alignpro.targets.connection import Connection
from alignpro.targets.local import LocalTarget
from alignpro.targets.mixture import TargetMixture, WeightedTarget
from alignpro.targets.remote import RemoteTarget

Connect = Callable[[EndpointConfig], Connection]
"""A server's configuration → what asks it."""


def build_target(
    config: TargetConfig,
    adapted: tuple[LanguageModel, ModelConfig] | None,
    prompting: PromptingConfig,
    respond: SamplingConfig,
    *,
    connect: Connect,
    load: Callable[[ModelConfig], LanguageModel] = load_language_model,
) -> Target:
    """Build the one target of a configuration.

    Args:
        config: The target.
        adapted: The policy or prompter with its configuration, for a target that is its base model.
        prompting: How empty rewrites are treated.
        respond: How the target will be sampled.
        connect: Connects to a server.
        load: Loads a model of this process.

    Raises:
        ConfigError: A context has no room for a prompt in addition to the response, or a wrapper is no template.
        ModelError: A model cannot be loaded.
    """
    (part,) = target_parts(config)
    return _build(part, "target", adapted, prompting, respond, connect, load)


def build_responder(
    config: TargetConfig,
    adapted: tuple[LanguageModel, ModelConfig] | None,
    prompting: PromptingConfig,
    respond: SamplingConfig,
    *,
    connect: Connect,
    load: Callable[[ModelConfig], LanguageModel] = load_language_model,
) -> Responder:
    """Build the target of a configuration, or its mixture of targets; arguments and errors are those of `build_target`."""
    parts = target_parts(config)
    if len(parts) == 1:
        return _build(parts[0], "target", adapted, prompting, respond, connect, load)
    return TargetMixture(
        [
            WeightedTarget(
                part.name,
                part.weight,
                _build(part, f"target {part.name}", adapted, prompting, respond, connect, load),
            )
            for part in parts
        ]
    )


def _build(
    part: TargetPart,
    name: str,
    adapted: tuple[LanguageModel, ModelConfig] | None,
    prompting: PromptingConfig,
    respond: SamplingConfig,
    connect: Connect,
    load: Callable[[ModelConfig], LanguageModel],
) -> Target:
    source = part.source
    if isinstance(source, TargetEndpointConfig):
        return RemoteTarget(connect(source), source, prompting.on_empty)
    if isinstance(source, ModelConfig):
        return LocalTarget.build(load(source), source, prompting, respond, name)
    assert adapted is not None  # a configuration that refers to it names it
    return LocalTarget.build(load_target(source, adapted[0]), adapted[1], prompting, respond, name)
