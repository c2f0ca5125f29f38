"""How the proxy rewrites the prompts of requests, and when it does not."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from alignpro.config.rewards import GuardConfig
from alignpro.config.rollout import EngineConfig
from alignpro.config.section import Section

DEFAULT_GUARDS = (
    GuardConfig(kind="language_change", high=0.0),
    GuardConfig(kind="length_ratio", low=0.2, high=8.0),
    GuardConfig(kind="numbers_kept", low=1.0),
    GuardConfig(kind="names_kept", low=1.0),
    GuardConfig(kind="code_kept", low=1.0),
)


class CandidatesConfig(Section):
    """Several rewrites of each prompt, of which a reward chooses one by the target's responses to them.

    It costs ``count`` · ``responses`` requests to the target for each request of a client.
    """

    count: int = Field(4, ge=2)
    """N, the rewrites that are drawn."""
    temperature: float = Field(1.0, gt=0)
    """Of the prompter."""
    choose: Literal["best", "gibbs"] = "best"
    """The rewrite with the highest reward, or one drawn with the weights softmax(R/λ) of the closed form."""
    kl_coef: float = Field(0.05, gt=0)
    """λ, for ``gibbs``."""
    responses: int = Field(1, ge=1)
    """M, the responses to each rewrite whose rewards are averaged."""


class LocalTargetConfig(Section):
    """The API of a target that runs in this process."""

    name: str | None = Field(None, min_length=1)
    """The model's name for clients; by default the last part of its path."""
    max_tokens: int = Field(1024, ge=1)
    """Length of a response to a request that names none, as far as the context has room."""
    max_waiting: int = Field(256, ge=1)
    """Requests that are being answered; further ones get a 429."""
    max_draws: int = Field(64, ge=1)
    """The largest ``n``."""


class RewritingConfig(Section):
    """The rewriting side of `alignpro serve`."""

    deadline_ms: float = Field(1000.0, gt=0)
    """Milliseconds after which the original is sent."""
    percent: float = Field(100.0, ge=0, le=100)
    """Share of the users whose prompts are rewritten; a request without a user counts by its conversation."""
    compare: bool = False
    """Whether the prompts of the other users are rewritten too, unused, so that both groups have the same measures."""
    shadow: bool = False
    """Rewrite and log, and send the originals."""
    temperature: float = Field(0.0, ge=0)
    """Of the prompter; 0 is greedy."""
    seed: int = Field(0, ge=0, lt=2**63)
    """What is drawn for a prompt depends on this and on the prompt alone."""
    skip_truncated: bool = True
    """Whether a rewrite that reached its token limit is not used. Training and evaluation use it as it is."""
    guards: tuple[GuardConfig, ...] = DEFAULT_GUARDS
    """Each with `low`, `high` or both: outside of them the original is sent."""
    candidates: CandidatesConfig | None = None
    """Draws several rewrites and chooses one by the run's reward."""
    max_characters: int = Field(20_000, ge=1)
    """Longer texts are not rewritten."""
    max_waiting: int = Field(64, ge=1)
    """Prompts of a run that are being rewritten; while there are as many, further originals are sent."""
    cached_rewrites: int = Field(4096, ge=0)
    """Prompts whose rewrite is kept, to be used again."""
    cached_turns: int = Field(65_536, ge=0)
    """Turns of conversations whose rewrite is kept, so that the target sees its earlier answers below what it was asked."""
    trust_remote_code: bool = False
    """Whether Python code that comes with a run's model may run, if the run's configuration says so."""
    engine: EngineConfig = EngineConfig()
    """The memory of all models in this process, and how many sequences run at the same time."""
    target: LocalTargetConfig = LocalTargetConfig()

    @field_validator("guards")
    @classmethod
    def _check_guards(cls, guards: tuple[GuardConfig, ...]) -> tuple[GuardConfig, ...]:
        kinds = [guard.kind for guard in guards]
        for guard in guards:
            if guard.kind == "refusal_kept":
                raise ValueError(
                    "the guard refusal_kept compares responses, which are not there before the request: leave it out"
                )
            if guard.low is None and guard.high is None:
                raise ValueError(
                    f"the guard {guard.kind} needs `low`, `high` or both: outside of them nothing is rewritten"
                )
            if guard.penalty:
                raise ValueError(f"the guard {guard.kind} has a penalty, which only training uses: leave it out")
            if kinds.count(guard.kind) > 1:
                raise ValueError(f"the guard {guard.kind} occurs more than once")
        return guards
