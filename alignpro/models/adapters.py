"""Adapters: which weights of a model are trained, and the peft configuration of LoRAs and soft prompts."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

from alignpro.config import AdapterConfig
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.merging import merge_adapter
from alignpro.models.saving import BASE_DIRECTORY
from alignpro.prompting.chat_template import ChatTemplate


def add_adapter(language_model: LanguageModel, adapter: AdapterConfig) -> LanguageModel:
    """Make the weights that ``adapter`` names trainable and freeze the rest.

    If the model has an adapter and ``adapter`` names no kind, training continues on it, and the same model is returned.
    Otherwise an existing LoRA is merged first. A soft prompt or activated LoRA cannot be merged: of the same kind, it is
    continued.

    Args:
        language_model: The model as `load_trainable` returns it.
        adapter: What is trained.

    Raises:
        ModelError: The adapter cannot be added to this model.
    """
    model = language_model.model
    if isinstance(model, PeftModel):
        if adapter.kind is None:
            return language_model
        if model.active_peft_config.is_prompt_learning or language_model.invocation:
            _check_continued(language_model, model, adapter)
            return language_model
        model = merge_adapter(model, language_model.name)
        model.name_or_path = BASE_DIRECTORY
    full = adapter.kind in (None, "full")
    model.requires_grad_(full)
    if full:
        return LanguageModel(model, language_model.tokenizer, language_model.name)
    if adapter.kind == "soft_prompt" and adapter.virtual_tokens > language_model.context_length - 2:
        raise ModelError(
            f"model {language_model.name}: policy.adapter.virtual_tokens={adapter.virtual_tokens} leaves no room for prompt and "
            f"answer in its context of {language_model.context_length} tokens; lower it"
        )
    try:
        wrapped = get_peft_model(model, _peft_config(adapter, language_model))
    except (ValueError, OSError) as error:
        raise ModelError(f"model {language_model.name}: policy.adapter.kind={adapter.kind}: {error}") from error
    return LanguageModel(wrapped, language_model.tokenizer, language_model.name)


def describe_training(start: LanguageModel, model: LanguageModel) -> str:
    """Say in one line what is trained, given the model before and after `add_adapter`: parts and numbers of weights."""
    kind = model.model.active_peft_config.peft_type.value if isinstance(model.model, PeftModel) else None
    if model is start:
        what = f"its adapter ({kind}) goes on training"
    else:
        merged = "its adapter is merged into its weights, and " if isinstance(start.model, PeftModel) else ""
        what = merged + ("all weights are trained" if kind is None else f"a new adapter ({kind}) is trained")
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    return f"{model.name}: {what}: {trained:,} weights trained, {frozen:,} frozen"


def _check_continued(language_model: LanguageModel, model: PeftModel, adapter: AdapterConfig) -> None:
    """Refuse to train anything else than the soft prompt or activated LoRA that the model has."""
    soft = model.active_peft_config.is_prompt_learning
    kind = "soft prompt" if soft else "activated LoRA"
    if adapter.kind != ("soft_prompt" if soft else "lora") or adapter.activated == soft:
        keys = "policy.adapter.kind=soft_prompt" if soft else "policy.adapter.kind=lora policy.adapter.activated=true"
        raise ModelError(
            f"model {language_model.name}: it is {'a' if soft else 'an'} {kind}, which cannot be merged into weights: "
            f"continue training it (leave policy.adapter out, or set {keys}), or start from its base model"
        )


def _invocation_tokens(adapter: AdapterConfig, language_model: LanguageModel) -> list[int] | None:
    """Return the invocation tokens of an activated LoRA: those of the configured text, or the generation prompt."""
    if not adapter.activated:
        return None
    if adapter.invocation is None:
        return ChatTemplate(language_model.tokenizer).generation_prompt
    return list(language_model.tokenizer.encode(adapter.invocation, add_special_tokens=False))


def _peft_config(adapter: AdapterConfig, language_model: LanguageModel) -> PeftConfig:
    if adapter.kind == "lora":
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=adapter.rank,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # a factor: peft declares an int and divides it
            lora_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
            alora_invocation_tokens=_invocation_tokens(adapter, language_model),
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=adapter.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if adapter.init_text else PromptTuningInit.SAMPLE_VOCAB,
        prompt_tuning_init_text=adapter.init_text,
        tokenizer_name_or_path=language_model.tokenizer.name_or_path if adapter.init_text else None,
    )
