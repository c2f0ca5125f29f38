"""The models, and which of their weights are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from alignpro.config.section import Section, default_of


class AdapterConfig(Section):
    """The trained part of the policy: all weights, a LoRA, or a soft prompt (the last two by peft)."""

    kind: Literal["full", "lora", "soft_prompt"] | None = None
    """By default, an adapter in ``path`` goes on training as it is; of any other model, all weights are trained."""
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    activated: bool = False
    """Activated LoRA (Greenewald et al., 2025): the LoRA acts only from its invocation on; earlier tokens are computed by
    the base model."""
    invocation: str | None = None
    """The text in every prompt from which an activated LoRA acts; by default the opening of the assistant's turn."""
    virtual_tokens: int = Field(20, ge=1)
    init_text: str | None = None

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.activated and self.kind != "lora":
            raise ValueError(
                f"activated=true with kind={self.kind or 'full'}: only a LoRA can be activated: set kind=lora"
            )
        if self.invocation is not None and not (self.activated and self.invocation):
            raise ValueError("`invocation` is the text from which an activated LoRA acts: it needs activated=true")
        own = ("rank", "alpha", "dropout", "target_modules", "virtual_tokens", "init_text")
        if self.kind is None and (given := [key for key in own if getattr(self, key) != default_of(self, key)]):
            raise ValueError(f"{', '.join(given)} without kind: no adapter is added: set kind to lora or soft_prompt")
        return self


class ModelConfig(Section):
    """A causal language model, or a sequence classifier for rewards, by name or directory."""

    path: str
    tokenizer: str | None = None
    """Name or directory of the tokenizer; by default the model's own."""
    dtype: Literal["float64", "float32", "bfloat16", "float16", "auto"] = "float32"
    """``auto``: that of the files, or on a CPU float32 unless they are bfloat16 and that is as exact and faster."""
    attention: str = "sdpa"
    chat_template: str | None = None
    """``plain``, the name of one of the tokenizer's templates, or a Jinja file; by default the tokenizer's own."""
    pad_token: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


class TrainableModelConfig(ModelConfig):
    """A model that is trained."""

    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    from_scratch: bool = False
    """Start from random weights; ``path`` then only needs a ``config.json``."""
    gradient_checkpointing: bool = False


class PolicyConfig(TrainableModelConfig):
    """The policy: a causal language model, and its trained part."""

    adapter: AdapterConfig = AdapterConfig()
    reference: str | None = None
    """Path of the frozen reference ρ_sft; by default the policy's initial weights."""
