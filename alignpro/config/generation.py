"""How sequences are drawn, how many, and in what memory."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from alignpro.config.section import Section


class SamplingConfig(Section):
    """How tokens are drawn."""

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a sequence, and are no part of what it says. For a policy that is trained, the tokens of such a text are
    actions like all others: where a sequence ends is decided by what it has drawn, so nothing is biased."""


class EngineConfig(Section):
    """Memory and batches of generation; `alignpro.engine.Engine` says more."""

    max_batch: int = Field(256, ge=1)
    """Sequences of a model that run at once."""
    pool_bytes: int | None = Field(None, ge=1)
    """Memory for keys and values on each device; chosen by the device when absent."""
    page_tokens: int = Field(16, ge=1)
    """Tokens of the largest model in a page."""
    token_budget: int = Field(4096, ge=1)
    """Tokens computed in one forward pass; what is left of long prompts waits for the next."""
    cuda_graphs: bool | None = None
    """Whether passes of next tokens alone are replayed as CUDA graphs; where they can be when absent."""


class RolloutConfig(Section):
    """How many chains a step: P prompts, K rewrites each, M responses to each rewrite."""

    prompts_per_step: int = Field(16, ge=1)
    rewrites_per_prompt: int = Field(8, ge=1)
    responses_per_rewrite: int = Field(1, ge=1)
    rewrite: SamplingConfig = SamplingConfig()
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    keep_cache: bool = True
    """On an accelerator the update gets the engine's memory, but for what the frozen target has cached; false: all of it."""


class ResponseRolloutConfig(Section):
    """RLHF of the target: P prompts, K responses each."""

    prompts_per_step: int = Field(16, ge=1)
    responses_per_prompt: int = Field(8, ge=1)
    respond: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
