"""The configuration of `alignpro sweep`: an experiment, of which some keys take several values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from alignpro.config.experiment import (
    BestOfMethod,
    ExperimentConfig,
    GibbsMethod,
    Method,
    RLHFMethod,
    TrainMethod,
    needs_prompter,
)
from alignpro.config.policy_methods import SoftPromptMethod, TargetAdapterMethod
from alignpro.config.section import Section
from alignpro.config.self_reward import SelfRewardMethod


class RangeConfig(Section):
    """Values between two bounds, on a linear or a logarithmic scale."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    integer: bool = False
    """Whether values are rounded to whole numbers."""
    count: int | None = Field(None, ge=2)
    """How many values a grid takes, both bounds included; a random search needs none."""

    @model_validator(mode="after")
    def _check(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} is not below high={self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low={self.low:g}: a logarithmic scale needs positive bounds")
        for name in ("low", "high"):
            if self.integer and not float(getattr(self, name)).is_integer():
                raise ValueError(f"{name}={getattr(self, name):g}: whole numbers need bounds that are whole")
        return self

    def at(self, share: float) -> int | float:
        """The value at a share of the way from low to high, to 4 significant digits; the bounds themselves to all of theirs."""
        if self.scale == "log":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        if self.integer:
            return round(value)
        ends = {0.0: self.low, 1.0: self.high}
        return ends.get(share, min(max(float(f"{value:.4g}"), self.low), self.high))


def _kind(value: Any) -> str:
    return "range" if isinstance(value, dict | RangeConfig) else "values"


Parameter = Annotated[
    Annotated[RangeConfig, Tag("range")] | Annotated[list[Any], Field(min_length=1), Tag("values")],
    Discriminator(_kind),
]
"""The values of a key: a list, or a range."""

_SWEPT = ("kl_coef", "rewrite", "prompting", "train", "rlhf", "methods")
_CROSSED = ("prompters", "targets", "tasks", "seeds")


class SweepSection(Section):
    """Which keys take which values."""

    parameters: dict[str, Parameter] = Field(min_length=1)
    """Dotted key of the experiment → its values: ``kl_coef``, ``train.optimizer.learning_rate``, ``methods.gibbs.candidates``."""
    search: Literal["grid", "random"] = "grid"
    """``grid`` crosses all values; ``random`` draws ``points`` of them."""
    points: int | None = Field(None, ge=1)
    """Points of a random search. With more, those that were drawn before stay."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the random search."""
    methods: list[str] | None = None
    """Which methods take part; by default all that a swept key concerns."""
    selection: float = Field(0.5, gt=0, lt=1)
    """Share of the held-out prompts on which the best point is chosen; it is reported on the others."""

    @field_validator("parameters")
    @classmethod
    def _check_keys(cls, given: dict[str, Parameter]) -> dict[str, Parameter]:
        for key in given:
            head = key.partition(".")[0]
            if head in _CROSSED:
                raise ValueError(f"{key}: an experiment crosses {head} itself: name several there")
            if head not in _SWEPT:
                raise ValueError(
                    f"{key}: cannot be swept; sweep keys of {', '.join(_SWEPT)}: the others would change what all are compared on"
                )
        return given

    @model_validator(mode="after")
    def _check_search(self) -> SweepSection:
        if self.search == "random" and self.points is None:
            raise ValueError("search=random needs `points`, the number of draws")
        if self.search == "grid":
            if self.points is not None:
                raise ValueError("points: a grid has as many as its values; give search=random, or leave it out")
            for key, parameter in self.parameters.items():
                if isinstance(parameter, RangeConfig) and parameter.count is None:
                    raise ValueError(f"parameters.{key}: a range in a grid needs `count`, the number of its values")
        return self


class SweepConfig(ExperimentConfig):
    """`alignpro sweep`: an experiment whose methods are run at each point of a grid, or of a random search."""

    sweep: SweepSection

    @property
    def swept_methods(self) -> list[str]:
        """The methods that are run at each point."""
        concerned = [name for name in self.methods if any(self.concerned(key, name) for key in self.sweep.parameters)]
        return concerned if self.sweep.methods is None else [each for each in concerned if each in self.sweep.methods]

    def concerned(self, key: str, name: str) -> bool:
        """Whether a swept key makes a difference to a method: not if what stands above it sets the same."""
        return concerns(key, name, self.methods[name]) and not self._set_above(key, name)

    def _set_above(self, key: str, name: str) -> bool:
        """Whether `train` or `rlhf`, or the method itself, has a value of its own in place of that of a swept key."""
        head, *rest = key.split(".")
        path = {"kl_coef": ["objective", "kl", "coef"], "rewrite": ["rollout", "rewrite", *rest]}.get(head)
        path = path or (["prompting", *rest] if head == "prompting" else rest)
        layers = [] if head == "methods" else _own_sections(self.methods[name])
        if layers and head in ("kl_coef", "rewrite", "prompting"):
            layers.append(self.rlhf if _trains_target(self.methods[name]) else self.train)
        return any(_sets(layer, path) for layer in layers)

    @model_validator(mode="after")
    def _check_sweep(self) -> SweepConfig:
        for name in self.sweep.methods or []:
            if name not in self.methods:
                raise ValueError(f"sweep.methods: {name}: no such method (methods: {', '.join(self.methods)})")
        for key in self.sweep.parameters:
            if not any(self.concerned(key, name) for name in self.swept_methods):
                above = any(concerns(key, name, method) for name, method in self.methods.items())
                reason = ": `train`, `rlhf` or the methods' own settings have another value" if above else ""
                raise ValueError(f"sweep.parameters.{key}: concerns none of the methods{reason}")
            prepared = [name for name, each in self.prompters.items() if each.prior is not None]
            if key.startswith("prompting") and prepared:
                raise ValueError(
                    f"sweep.parameters.{key}: prompters.{prepared[0]}.prior is made once, with one `prompting`: leave "
                    "out one of them"
                )
        return self


def _own_sections(method: Method) -> list[Mapping[str, Any]]:
    """The sections of a training that a method sets itself."""
    match method:
        case SelfRewardMethod():
            return [method.sections(method.alphas[0]), method.settings]
        case SoftPromptMethod():
            return [method.sections, method.settings]
        case TrainMethod() | RLHFMethod() | TargetAdapterMethod():
            return [method.settings]
        case _:
            return []


def _trains_target(method: Method) -> bool:
    return isinstance(method, RLHFMethod) or (isinstance(method, SoftPromptMethod) and method.before == "target")


def _sets(sections: Mapping[str, Any], path: Sequence[str]) -> bool:
    """Whether sections have a value at a path, or in place of a section on the way there."""
    found: Any = sections
    for part in path:
        if not isinstance(found, Mapping):
            return True
        if part not in found:
            return False
        found = found[part]
    return not isinstance(found, Mapping)


def concerns(key: str, name: str, method: Method) -> bool:
    """Whether a swept key changes what a method does, or how its rewrites are sampled."""
    trains = isinstance(method, TrainMethod | TargetAdapterMethod | SelfRewardMethod)
    before = method.before if isinstance(method, SoftPromptMethod) else None
    match key.split(".")[0]:
        case "train":
            return trains or before == "prompter"
        case "rlhf":
            return isinstance(method, RLHFMethod) or before == "target"
        case "kl_coef":
            return trains or isinstance(method, SoftPromptMethod | RLHFMethod | GibbsMethod)
        case "methods":
            chooses = isinstance(method, GibbsMethod | BestOfMethod)
            return key.split(".")[1:2] == [name] and (
                trains or chooses or isinstance(method, SoftPromptMethod | RLHFMethod)
            )
        case _:
            return needs_prompter(method) or isinstance(method, TargetAdapterMethod)
