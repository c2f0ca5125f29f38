"""The reward: components and drift guards."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_serializer, model_validator

from alignpro.config.endpoints import EndpointConfig, ProxyURL, require_http_url
from alignpro.config.models import ModelConfig
from alignpro.config.section import Section

NOT_IMPORTABLE = "not importable, give the function again: "
"""What `function_name` writes before the name of a function that no configuration file can name."""


def _require_http(url: str) -> str:
    require_http_url(url)
    return url  # with the slash at its end, if there is one: without it would be another URL


class FunctionRewardConfig(Section):
    """A Python function ``fn(prompts, responses, **params) -> list[float]``."""

    kind: Literal["function"]
    function: str | Callable[..., Any]
    """``package.module:name`` or ``path/to/file.py:name``; from Python also the function itself, which is written as
    `function_name`."""
    name: str | None = None
    weight: float = 1.0
    params: dict[str, Any] = Field(default_factory=dict)
    whole_batch: bool = False
    """Whether an ``async def`` function gets all samples of a step at once, and not those of each rewrite as soon as they are
    there: for one whose scores depend on the other samples. Every other function does."""

    @field_serializer("function")
    def _serialize(self, function: str | Callable[..., Any]) -> str:
        return function_name(function)


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
    must_beat_length: bool = False
    """Whether a model of `alignpro reward` is refused that ranks held-out pairs no better than the lengths of their responses."""


class JudgeRewardConfig(Section):
    """A language model behind a server that judges the response by a rubric."""

    kind: Literal["judge"]
    endpoint: EndpointConfig
    mode: Literal["score", "pairwise"] = "score"
    """``score`` grades the response on a scale; ``pairwise`` compares it with the reference, in both orders."""
    rubric: str | None = None
    """A Jinja file, by default the built-in rubric of the mode. It is the only template: texts and answers never are."""
    criteria: str = ""
    """What the built-in rubrics ask to look for, in place of their own general words."""
    reference: str | None = None
    """A column of the data: a response to compare with, or what a good one contains."""
    system: str | None = None
    """A system message for the judge."""
    low: float = 1.0
    """The worst score, of ``score``."""
    high: float = 10.0
    """The best."""
    temperature: float = Field(0.0, ge=0)
    """Of the first attempt; further ones are drawn at 1 if this is 0, since a greedy answer would not change."""
    max_tokens: int = Field(1024, ge=1)
    attempts: int = Field(3, ge=1)
    """How often a question is asked whose answers cannot be read."""
    on_error: Literal["stop", "abstain"] = "stop"
    """What happens then: the run ends with an error that names the prompt, or the judge abstains from the response."""
    name: str | None = None
    weight: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> JudgeRewardConfig:
        if self.low >= self.high:
            raise ValueError(
                f"low={self.low:g} is not below high={self.high:g}: the worst score is `low`, the best `high`"
            )
        if self.mode == "pairwise" and self.reference is None:
            raise ValueError(
                "mode=pairwise compares the response with another: name its column of the data as `reference`, such as "
                "`reference: response`"
            )
        if self.system is not None and self.endpoint.api == "completions":
            raise ValueError("`system` needs endpoint.api=chat: completions get one text, which is the rubric's")
        return self


class JSONServerConfig(Section):
    """A server of any JSON; keys that an `EndpointConfig` has too mean the same."""

    url: Annotated[str, AfterValidator(_require_http)]
    """What is posted to."""
    model: str = Field("json", min_length=1)
    """The name under which `prices` has what a request costs."""
    api_key_env: str | None = None
    extra_headers: dict[str, str] = Field(default_factory=dict)
    extra_query: dict[str, str] = Field(default_factory=dict)
    ca_bundle: Path | None = None
    proxy: ProxyURL | None = None
    requests_per_minute: float | None = Field(None, gt=0)
    max_concurrency: int = Field(64, ge=1)
    timeout_seconds: float = Field(300.0, gt=0)
    max_retries: int = Field(8, ge=0)
    max_failures: int = Field(32, ge=1)
    max_answer_bytes: int = Field(1 << 22, ge=1)

    def endpoint(self) -> tuple[EndpointConfig, str]:
        """The server as an endpoint, and the path after its base URL."""
        shared = {name: getattr(self, name) for name in type(self).model_fields if name != "url"}
        base = self.url.rstrip("/")
        return EndpointConfig(base_url=base, n=False, seed=False, **shared), self.url[len(base) :]


class HTTPRewardConfig(Section):
    """A server that answers a sample, or a batch of them, with scores as JSON."""

    kind: Literal["http"]
    server: JSONServerConfig
    body: dict[str, Any] | list[Any]
    """What is sent, with placeholders for the texts; see `alignpro.rewards.json_mapping.BodyTemplate`."""
    score: str
    """Where in the answer the score is, or the list of scores; see `alignpro.rewards.json_mapping.ScorePath`."""
    batch_size: int | None = Field(None, ge=1)
    """Samples of one request; without it a request is for one sample, and its placeholders are no lists."""
    on_error: Literal["stop", "abstain"] = "stop"
    """What happens if the server refuses a text, or gives null or no finite number as its score: the run ends with an error
    that names the prompt, or the component abstains from the response."""
    name: str | None = None
    weight: float = 1.0


class GuardConfig(Section):
    """A drift guard: a metric that compares the rewrite with the original, and optionally a penalty.

    The penalty is ``penalty`` times the distance of the metric from [low, high].
    """

    kind: Literal[
        "length_ratio",
        "copy_rate",
        "language_change",
        "numbers_kept",
        "names_kept",
        "code_kept",
        "embedding_similarity",
        "refusal_kept",
    ]
    """``refusal_kept`` compares responses instead: it is 0 where the target refuses the prompt as it is and no longer refuses
    the rewrite, else 1, and its range is [1, 1]."""
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
        if self.kind == "refusal_kept":
            if self.low is not None or self.high is not None:
                raise ValueError(
                    "refusal_kept takes no `low` and `high`: `penalty` is subtracted wherever a refusal is lost"
                )
            return self
        if self.penalty > 0 and self.low is None and self.high is None:
            raise ValueError("a guard with a penalty needs `low`, `high` or both: the range without penalty")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}: every value would be penalised")
        return self


RewardComponentConfig = Annotated[
    FunctionRewardConfig | ModelRewardConfig | JudgeRewardConfig | HTTPRewardConfig, Field(discriminator="kind")
]


class RewardConfig(Section):
    """r*(x, y): a weighted sum of components, minus the penalties of the guards."""

    components: list[RewardComponentConfig] = Field(min_length=1)
    guards: list[GuardConfig] = Field(default_factory=list)

    @property
    def keeps_refusals(self) -> bool:
        """Whether a guard needs the target's responses to unchanged prompts."""
        return any(guard.kind == "refusal_kept" for guard in self.guards)

    @property
    def endpoints(self) -> list[EndpointConfig]:
        """The servers that components ask."""
        judges = [each.endpoint for each in self.components if isinstance(each, JudgeRewardConfig)]
        return judges + [each.server.endpoint()[0] for each in self.components if isinstance(each, HTTPRewardConfig)]


def function_name(function: str | Callable[..., Any]) -> str:
    """The name of a function in a configuration file: ``package.module:name`` if it can be imported by that.

    A function of a script, a notebook or another function, or an object that is called, cannot: its name comes after
    `NOT_IMPORTABLE`. A run with it is resumed from Python, with the same function.
    """
    if isinstance(function, str):
        return function
    module = getattr(function, "__module__", None) or "__main__"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        importable = module != "__main__" and operator.attrgetter(name)(importlib.import_module(module)) is function
    except (ImportError, AttributeError):
        importable = False
    return f"{'' if importable else NOT_IMPORTABLE}{module}:{name}"
