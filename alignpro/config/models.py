"""Which models, and what of them is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from alignpro.config.section import Section


class AdapterConfig(Section):
    """What of the policy is trained: all weights, a LoRA, or a soft prompt (both by peft)."""

    kind: Literal["full", "lora", "soft_prompt"] = "full"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    activated: bool = False
    """The LoRA acts from its invocation on (Greenewald et al., 2025): what stands before is as in the base model."""
    invocation: str | None = None
    """The text with which an activated LoRA begins to act, in every prompt; what opens the assistant's turn when absent."""
    virtual_tokens: int = Field(20, ge=1)
    init_text: str | None = None

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.activated and self.kind != "lora":
            raise ValueError(f"activated=true with kind={self.kind}: only a LoRA can be activated: set kind=lora")
        if self.invocation is not None and not (self.activated and self.invocation):
            raise ValueError("`invocation` is the text at which an activated LoRA begins: it needs activated=true")
        return self


class ModelConfig(Section):
    """A causal language model, or a sequence classifier for rewards, by name or directory."""

    path: str
    tokenizer: str | None = None
    """Name or directory of the tokenizer; the model's own when absent."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    attention: str = "sdpa"
    chat_template: str | None = None
    """``plain``, or a file with a Jinja template; the tokenizer's own when absent."""
    pad_token: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


class TrainableModelConfig(ModelConfig):
    """A model that is trained."""

    from_scratch: bool = False
    """Start from random weights: ``path`` then needs no more than a ``config.json``."""
    gradient_checkpointing: bool = False


class PolicyConfig(TrainableModelConfig):
    """The policy: a causal language model, and what of it is trained."""

    adapter: AdapterConfig = AdapterConfig()
    reference: str | None = None
    """Path of the frozen reference ρ_sft; where the policy starts from when absent."""
