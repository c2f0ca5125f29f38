"""Load language models, add adapters to them, save them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignpro.config import AdapterConfig, ModelConfig, PolicyConfig
from alignpro.errors import ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.tokenization import load_tokenizer

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

BASE = "base"
"""Subdirectory of a saved adapter with its base model, if that exists nowhere else: a merged or a random model."""


def resolve_device(device: str) -> torch.device:
    """Resolve a device name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        ModelError: The device is not available.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # torch built without that backend asserts
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"device {device}: cannot be used: {reason}; set device to auto, cpu or cuda:N") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def load_language_model(config: ModelConfig) -> LanguageModel:
    """Load a frozen model and its tokenizer, by name or directory; for a peft adapter's directory, with its base model.

    Raises:
        ModelError: There is no such model, it is not a causal language model, or it has no usable tokenizer.
    """
    tokenizer = load_tokenizer(config)
    model = _load_causal(config)
    language_model = LanguageModel(model, tokenizer, config.path)
    language_model.requires_grad_(False)
    return language_model.eval()


def load_target(
    config: ModelConfig | str,
    adapted: LanguageModel | None,
    load: Callable[[ModelConfig], LanguageModel] = load_language_model,
) -> LanguageModel:
    """Load the frozen target: a separate model, or, if ``config`` is a string, the base model below ``adapted``'s LoRA.

    Args:
        config: The target's configuration, or the string that refers to ``adapted``.
        adapted: The policy or prompter.
        load: Loads a separate model.

    Raises:
        ModelError: As `load_language_model`, or ``adapted`` has no LoRA that can be switched off per token.
    """
    if not isinstance(config, str):
        return load(config)
    assert adapted is not None  # a configuration that refers to it names it
    return adapted.base()


def load_trainable(config: PolicyConfig, seed: int) -> LanguageModel:
    """Load a policy's initial model; with ``from_scratch``, initialise it with random weights drawn from ``seed``.

    Raises:
        ModelError: As `load_language_model`.
    """
    torch.manual_seed(seed)  # also for what the caller draws next, such as an adapter's initial weights
    if not config.from_scratch:
        return load_language_model(config)
    tokenizer = load_tokenizer(config)
    with _naming(config.path):
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            architecture,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    model.name_or_path = BASE
    return LanguageModel(model.to(resolve_device(config.device)), tokenizer, config.path)


def is_activated(directory: str) -> bool:
    """Whether a saved adapter is an activated LoRA."""
    with _naming(directory):
        return getattr(PeftConfig.from_pretrained(directory), "alora_invocation_tokens", None) is not None


def _load_causal(config: ModelConfig) -> PreTrainedModel | PeftModel:
    directory = Path(config.path)
    with _naming(config.path):
        if (directory / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(config.path).base_model_name_or_path
            if not base:
                raise ValueError("its adapter_config.json has no base_model_name_or_path")
            if base == BASE and (directory / BASE).is_dir():
                base = str(directory / BASE)
            return PeftModel.from_pretrained(_load_causal(config.model_copy(update={"path": base})), config.path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
    return model.to(resolve_device(config.device))


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the model's name to loading errors; transformers' own messages say why it failed."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        hint = " (here: attention=eager)" if 'attn_implementation="eager"' in str(error) else ""
        raise ModelError(f"model {path}: cannot be loaded as a causal language model: {error}{hint}") from error


def add_adapter(language_model: LanguageModel, adapter: AdapterConfig) -> LanguageModel:
    """Make the weights that ``adapter`` names trainable and freeze the rest; an existing LoRA is merged first.

    An existing soft prompt or activated LoRA cannot be merged: training continues on it, and the same model is returned.

    Raises:
        ModelError: The adapter cannot be added to this model.
    """
    model = language_model.model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning or language_model.invocation:
            _train_on(language_model, model, adapter)
            return language_model
        model = model.merge_and_unload()
        model.name_or_path = BASE
    model.requires_grad_(adapter.kind == "full")
    if adapter.kind == "full":
        return LanguageModel(model, language_model.tokenizer, language_model.name)
    try:
        wrapped = get_peft_model(model, _peft_config(adapter, language_model))
    except (ValueError, OSError) as error:
        raise ModelError(f"model {language_model.name}: policy.adapter.kind={adapter.kind}: {error}") from error
    return LanguageModel(wrapped, language_model.tokenizer, language_model.name)


def _train_on(language_model: LanguageModel, model: PeftModel, adapter: AdapterConfig) -> None:
    soft = model.active_peft_config.is_prompt_learning
    kind = "soft prompt" if soft else "activated LoRA"
    if adapter.kind != ("soft_prompt" if soft else "lora") or adapter.activated == soft:
        keys = "policy.adapter.kind=soft_prompt" if soft else "policy.adapter.kind=lora policy.adapter.activated=true"
        raise ModelError(
            f"model {language_model.name}: it is {'a' if soft else 'an'} {kind}, which cannot be merged into weights: "
            f"continue training it with {keys}, or start from its base model"
        )
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("prompt_encoder.") if soft else ".lora_" in name)


def _invocation(adapter: AdapterConfig, language_model: LanguageModel) -> list[int] | None:
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
            alora_invocation_tokens=_invocation(adapter, language_model),
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=adapter.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if adapter.init_text else PromptTuningInit.SAMPLE_VOCAB,
        prompt_tuning_init_text=adapter.init_text,
        tokenizer_name_or_path=language_model.tokenizer.name_or_path if adapter.init_text else None,
    )


def frozen_copy(language_model: LanguageModel) -> LanguageModel:
    """Copy a model so that training does not change the copy; it shares untrained weights and keeps weights tied."""
    model = language_model.model
    shared = [language_model.tokenizer, *(w for w in model.parameters() if not w.requires_grad)]
    return copy.deepcopy(language_model, {id(part): part for part in shared}).requires_grad_(False).eval()


def save_pretrained(language_model: LanguageModel, directory: Path) -> None:
    """Write a directory that ``from_pretrained`` (and `load_language_model`) reads: weights or adapter, and tokenizer.

    An adapter whose base model exists nowhere else is saved with it, in ``base/``.

    Raises:
        OSError: The files cannot be written.
    """
    model, causal = language_model.model, language_model.causal
    try:
        if isinstance(model, PeftModel):
            # Embeddings are never trained together with an adapter; by default peft would query the hub to find out.
            model.save_pretrained(str(directory), save_embedding_layers=False)
            adapter: Any = model.active_peft_config
            if adapter.base_model_name_or_path == BASE:
                weights = {n.replace(".base_layer", ""): w for n, w in causal.state_dict().items() if ".lora_" not in n}
                causal.save_pretrained(directory / BASE, state_dict=weights)
        else:
            model.save_pretrained(directory)
        language_model.tokenizer.save_pretrained(directory)
    except SafetensorError as error:  # raised, for example, when the disk is full
        raise OSError(f"{directory}: {error}") from error


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits of a SHA-256 over names, dtypes, shapes and all bytes of named weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
