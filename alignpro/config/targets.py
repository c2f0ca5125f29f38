"""The frozen target: a model of this process, a model behind a server, or several of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from alignpro.config.endpoints import EndpointConfig, SpendingConfig, TargetEndpointConfig
from alignpro.config.models import ModelConfig
from alignpro.config.section import Section


class RemoteTargetConfig(Section):
    """A target behind a server."""

    endpoint: TargetEndpointConfig


class MixedModelConfig(ModelConfig):
    """One of several targets: a model of this process."""

    weight: float = Field(1.0, gt=0)
    """How often a prompt gets this target, in proportion to the others' weights."""
    name: str | None = None
    """In metrics and of the directory of its evaluation; by default the name of the model."""


class MixedEndpointConfig(RemoteTargetConfig):
    """One of several targets, behind a server."""

    weight: float = Field(1.0, gt=0)
    name: str | None = None


def _kind(value: Any) -> str:
    """The tag of what a target is, as read from YAML or as built before: the name of its class, or ``name``."""
    if isinstance(value, str):
        return "name"
    if isinstance(value, Section):
        return type(value).__name__
    keys = value.keys() if isinstance(value, dict) else ()
    return "TargetMixtureConfig" if "mixture" in keys else "RemoteTargetConfig" if "endpoint" in keys else "ModelConfig"


def _mixed_kind(value: Any) -> str:
    if isinstance(value, Section):
        return type(value).__name__
    return "MixedEndpointConfig" if isinstance(value, dict) and "endpoint" in value else "MixedModelConfig"


MixedTarget = Annotated[
    Annotated[MixedModelConfig, Tag("MixedModelConfig")] | Annotated[MixedEndpointConfig, Tag("MixedEndpointConfig")],
    Discriminator(_mixed_kind),
]


class TargetMixtureConfig(Section):
    """Several targets, for which one prompter is trained: each prompt of a step gets one of them, drawn by weight."""

    mixture: list[MixedTarget] = Field(min_length=2)

    @model_validator(mode="after")
    def _check_names(self) -> TargetMixtureConfig:
        names = [part.name for part in target_parts(self)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two targets are called {name!r}: give each a `name` of its own")
            if PurePath(name).name != name:
                raise ValueError(
                    f"a target is called {name!r}, which is no name of a directory: give it another `name`"
                )
        return self


_Separate = (
    Annotated[ModelConfig, Tag("ModelConfig")]
    | Annotated[RemoteTargetConfig, Tag("RemoteTargetConfig")]
    | Annotated[TargetMixtureConfig, Tag("TargetMixtureConfig")]
)
PolicyOrTarget = Annotated[Annotated[Literal["policy"], Tag("name")] | _Separate, Discriminator(_kind)]
"""A target, or ``policy``: the base model of the policy's LoRA with its tokenizer and template, held in memory only once."""
PrompterOrTarget = Annotated[Annotated[Literal["prompter"], Tag("name")] | _Separate, Discriminator(_kind)]
"""A target, or ``prompter``: the base model of the prompter's LoRA, likewise."""

TargetConfig = str | ModelConfig | RemoteTargetConfig | TargetMixtureConfig
"""What a key ``target`` holds."""


@dataclass(frozen=True)
class TargetPart:
    """One target of a configuration."""

    name: str
    weight: float
    source: str | ModelConfig | TargetEndpointConfig
    """``policy`` or ``prompter``, a model of this process, or a server."""


def target_parts(target: TargetConfig) -> list[TargetPart]:
    """The targets of a configuration: one, or those of a mixture."""
    given = target.mixture if isinstance(target, TargetMixtureConfig) else [target]
    parts = []
    for each in given:
        source = each.endpoint if isinstance(each, RemoteTargetConfig) else each
        mixed = each if isinstance(each, MixedModelConfig | MixedEndpointConfig) else None
        name = (mixed.name if mixed else None) or default_name(source)
        parts.append(TargetPart(name, mixed.weight if mixed else 1.0, source))
    return parts


def default_name(source: str | ModelConfig | TargetEndpointConfig) -> str:
    """The last part of a model's path or name; the run directory's name if the path is a run's ``model/``."""
    if isinstance(source, str):
        return source
    path = PurePath(source.path if isinstance(source, ModelConfig) else source.model)
    return path.parent.name if path.name == "model" else path.name


def separate_models(target: TargetConfig) -> list[ModelConfig]:
    """The models of this process that are targets and nothing else."""
    return [part.source for part in target_parts(target) if isinstance(part.source, ModelConfig)]


def target_endpoints(target: TargetConfig) -> list[TargetEndpointConfig]:
    """The servers that are targets."""
    return [part.source for part in target_parts(target) if isinstance(part.source, TargetEndpointConfig)]


def check_spending(spending: SpendingConfig, endpoints: Sequence[EndpointConfig]) -> None:
    """Check that a limit in dollars can be kept.

    Raises:
        ValueError: A model that is asked has no price.
    """
    if spending.budget.usd is not None:
        for endpoint in endpoints:
            if endpoint.model not in spending.prices:
                raise ValueError(
                    f"budget.usd needs the price of {endpoint.model}: give prices.{endpoint.model} {{input: …, output: …}} "
                    "in dollars for a million tokens, or limit budget.requests or budget.tokens instead"
                )
