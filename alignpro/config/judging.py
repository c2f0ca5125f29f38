"""Who compares the responses of an evaluation's arms in pairs, and how they are asked."""

from __future__ import annotations

from pathlib import PurePath

from pydantic import Field, model_validator

from alignpro.config.endpoints import EndpointConfig, SpendingConfig
from alignpro.config.models import ModelConfig
from alignpro.config.rollout import EngineConfig
from alignpro.config.section import Section

BASELINE_ARM = "no_finetuning"


class JudgeModelConfig(Section):
    """A judge: a language model behind a server, or one of this process."""

    endpoint: EndpointConfig | None = None
    model: ModelConfig | None = None
    name: str | None = None
    """In results; by default that of the model."""

    @property
    def label(self) -> str:
        """Its name."""
        if self.name is not None:
            return self.name
        return (
            self.endpoint.model if self.endpoint is not None else PurePath(self.model.path if self.model else "").name
        )

    @model_validator(mode="after")
    def _check_one(self) -> JudgeModelConfig:
        if (self.endpoint is None) == (self.model is None):
            raise ValueError("a judge is either behind an `endpoint`, or a `model` of this process: give one of both")
        return self


class JudgingConfig(JudgeModelConfig):
    """The section ``judge`` of an evaluation: its arms are compared in pairs of responses to the same prompt."""

    second: JudgeModelConfig | None = None
    """Another judge, who is asked the same: Cohen's κ says how far both agree."""
    against: list[str] = Field(default=[BASELINE_ARM], min_length=1)
    """The arms with which each other arm is compared."""
    pairs_per_prompt: int = Field(1, ge=1)
    """Pairs of each prompt in each comparison; each is asked about in both orders."""
    rubric: str | None = None
    """A Jinja file, by default the built-in rubric for comparisons."""
    criteria: str = ""
    """What the built-in rubric asks to look for, in place of its own general words."""
    system: str | None = None
    """A system message for the judges."""
    temperature: float = Field(0.0, ge=0)
    """Of the first attempt; further ones are drawn at 1 if this is 0, since a greedy answer would not change."""
    max_tokens: int = Field(512, ge=1)
    attempts: int = Field(3, ge=1)
    """How often a question is asked whose answers cannot be read; then its pair has no verdict, and is counted."""

    @property
    def judges(self) -> list[JudgeModelConfig]:
        """All judges."""
        return [self, *([self.second] if self.second is not None else [])]

    @property
    def endpoints(self) -> list[EndpointConfig]:
        """The servers that are asked."""
        return [each.endpoint for each in self.judges if each.endpoint is not None]

    @model_validator(mode="after")
    def _check(self) -> JudgingConfig:
        labels = [each.label for each in self.judges]
        if len(set(labels)) < len(labels):
            raise ValueError(f"both judges are called {labels[0]!r}: give each a `name` of its own")
        if self.system is not None and any(each.api == "completions" for each in self.endpoints):
            raise ValueError("`system` needs endpoint.api=chat: completions get one text, which is the rubric's")
        return self


class JudgeConfig(SpendingConfig):
    """`alignpro judge`: compare the arms of finished evaluations by the responses that they recorded."""

    judge: JudgingConfig
    engine: EngineConfig = EngineConfig()
