"""The reward: components and drift guards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from alignpro.config.models import ModelConfig
from alignpro.config.section import Section


class FunctionRewardConfig(Section):
    """A Python function ``fn(prompts, responses, **params) -> list[float]``, as ``package.module:name`` or
    ``path/to/file.py:name``."""

    kind: Literal["function"]
    function: str
    name: str | None = None
    weight: float = 1.0
    params: dict[str, Any] = Field(default_factory=dict)


class ModelRewardConfig(Section):
    """A sequence-classification reward model, with its own tokenizer and template."""

    kind: Literal["model"]
    model: ModelConfig
    name: str | None = None
    weight: float = 1.0
    batch_size: int = Field(16, ge=1)
    max_length: int = Field(2048, ge=1)
    scale: float = 1.0
    offset: float = 0.0


class GuardConfig(Section):
    """A drift guard: a metric that compares the rewrite with the original, and optionally a penalty.

    The penalty is ``penalty`` times the distance of the metric from [low, high].
    """

    kind: Literal["length_ratio", "copy_rate", "language_change", "embedding_similarity"]
    penalty: float = Field(0.0, ge=0)
    low: float | None = None
    high: float | None = None
    model: ModelConfig | None = None
    """The encoder, for ``embedding_similarity``."""

    @model_validator(mode="after")
    def _check(self) -> GuardConfig:
        if (self.kind == "embedding_similarity") != (self.model is not None):
            raise ValueError(
                "`model` names the encoder of embedding_similarity: it is required there and not allowed elsewhere"
            )
        if self.penalty > 0 and self.low is None and self.high is None:
            raise ValueError("a guard with a penalty needs `low`, `high` or both: the range without penalty")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: every value would be penalised")
        return self


RewardComponentConfig = Annotated[FunctionRewardConfig | ModelRewardConfig, Field(discriminator="kind")]


class RewardConfig(Section):
    """r*(x, y): a weighted sum of components, minus the penalties of the guards."""

    components: list[RewardComponentConfig] = Field(min_length=1)
    guards: list[GuardConfig] = Field(default_factory=list)
