"""Sampling parameters, rollout sizes, and the memory of the engine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from alignpro.config.section import Section


class SamplingConfig(Section):
    """Sampling parameters."""

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a sequence; they are removed from its text. When a policy is trained, the tokens of a stop text are
    actions like any others: the end of a sequence depends only on its drawn tokens, so the gradient is not biased."""


class EngineConfig(Section):
    """Memory and batch sizes of generation; see `alignpro.engine.Engine`."""

    max_batch: int = Field(256, ge=1)
    """Maximum number of sequences of a model that run at the same time."""
    pool_bytes: int | None = Field(None, ge=1)
    """Memory for keys and values on each device; by default chosen from the device's memory."""
    page_tokens: int = Field(16, ge=1)
    """Page size in tokens of the largest model."""
    token_budget: int = Field(4096, ge=1)
    """Maximum number of tokens per forward pass; the rest of a long prompt waits for the next pass."""
    cuda_graphs: bool | None = None
    """Whether decode-only passes are replayed as CUDA graphs; by default wherever possible."""
    async_scheduling: bool | None = None
    """Whether a pass is launched before the tokens of the pass before it have arrived; by default on CUDA devices."""


class RolloutConfig(Section):
    """The chains per step: P prompts, K rewrites per prompt, M responses per rewrite."""

    prompts_per_step: int = Field(16, ge=1)
    rewrites_per_prompt: int = Field(8, ge=1)
    responses_per_rewrite: int = Field(1, ge=1)
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    ahead: int = Field(0, ge=0, le=1)
    """1: the rewrites of the next step are sampled before the answers to those of this step are awaited. They are one update
    old when they are trained on, and importance weights correct for it; see `alignpro.objectives.importance`."""
    max_importance_weight: float | None = Field(None, ge=1)
    """Limit of these weights; None keeps the gradient unbiased."""
    keep_cache: bool = True
    """On an accelerator, the engine frees its memory for the update. If true, the frozen target's cached prompts are kept."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.max_importance_weight is not None and not self.ahead:
            raise ValueError("max_importance_weight limits the weights of rewrites sampled ahead: it needs ahead=1")
        return self


class ResponseRolloutConfig(Section):
    """The rollout for RLHF of the target: P prompts, K responses per prompt."""

    prompts_per_step: int = Field(16, ge=1)
    responses_per_prompt: int = Field(8, ge=1)
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
