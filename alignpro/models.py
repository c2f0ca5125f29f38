"""Load language models and see each as a decoder (tokens → hidden states) and a head (hidden states → logits).

The split is what the fused head operators need: they take hidden states and the head's weight, never logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from alignpro.config import AdapterConfig, ModelConfig, PolicyConfig
from alignpro.errors import ModelError
from alignpro.tokenization import load_tokenizer

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Head:
    """The output layer: logits = softcap(weight · hidden + bias)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None

    def same_as(self, other: Head) -> bool:
        """Whether both read the same storage, so that a fused kernel may load the weight once."""
        return self.weight.data_ptr() == other.weight.data_ptr() and self.softcap == other.softcap


class LanguageModel(nn.Module):
    """A causal language model of transformers, plain or with a peft adapter, and its tokenizer.

    Args:
        model: The model; with peft, a LoRA is active inside it and a soft prompt is put in front by `hidden`.
        tokenizer: Its tokenizer.
        name: How messages call it: its path.

    Raises:
        ModelError: The architecture's logits are not head(hidden) (checked on two tokens, so that no architecture with
            a head of its own kind is trained or sampled wrongly in silence).
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self._check_head()

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside a peft wrapper, or the model itself."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.causal.device

    @property
    def context_length(self) -> int:
        """Tokens that the model can hold, those of a soft prompt taken off."""
        config = self.causal.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return int(limit) - self.virtual_tokens

    @property
    def virtual_tokens(self) -> int:
        """Length of the soft prompt; 0 without one."""
        return self.model.active_peft_config.num_virtual_tokens if self._has_soft_prompt else 0

    @property
    def head(self) -> Head:
        """The output layer as it is now; a LoRA on the head is added to the weight."""
        layer = self.causal.get_output_embeddings()
        weight = layer.weight
        if hasattr(layer, "get_delta_weight") and not layer.disable_adapters:  # a LoRA on the head itself
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter)
        softcap = getattr(self.causal.config.get_text_config(), "final_logit_softcapping", None)
        return Head(weight, getattr(layer, "bias", None), softcap)

    def hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """The last hidden states.

        Args:
            ids: (B, L) int64, padded on either side.
            attention_mask: (B, C + L) bool or int64, zero at padding, over what the cache holds and the new ids. With a
                soft prompt, its part is added here and never passed in.
            cache: Keys and values of C earlier positions, extended in place.

        Returns:
            (B, L, D) in the model's dtype.
        """
        past = cache.get_seq_length() if cache is not None else 0
        inputs: dict[str, Any] = {"input_ids": ids}
        attention_mask = attention_mask.to(torch.int64)
        prefix = self.virtual_tokens
        if prefix:
            attention_mask = nn.functional.pad(attention_mask, (prefix, 0), value=1)
            if past == 0:
                soft = self.model.get_prompt(batch_size=len(ids))  # (B, prefix, D)
                embedded = self.causal.get_input_embeddings()(ids)
                inputs = {"inputs_embeds": torch.cat([soft.to(embedded.dtype), embedded], dim=1)}
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, past:]  # (B, L) or with the soft prompt in front
        output = self.causal.base_model(
            **inputs,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state[:, -ids.shape[1] :]

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The model as it was before its adapter."""
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            self._soft_prompt_off = True
            try:
                yield
            finally:
                self._soft_prompt_off = False

    _soft_prompt_off = False

    @property
    def _has_soft_prompt(self) -> bool:
        return (
            isinstance(self.model, PeftModel)
            and self.model.active_peft_config.is_prompt_learning
            and not self._soft_prompt_off
        )

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.tensor([[0, 1]], device=self.device)
        training = self.model.training
        self.model.eval()
        with self.adapter_off():
            try:
                expected = self.causal(input_ids=ids).logits
                hidden, head = self.hidden(ids, torch.ones_like(ids)), self.head
            except (AttributeError, TypeError) as error:
                raise ModelError(
                    f"model {self.name}: {type(self.causal).__name__} is not supported: {error}"
                ) from error
            logits = nn.functional.linear(hidden, head.weight, head.bias)
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
        self.model.train(training)
        if not torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2):
            raise ModelError(
                f"model {self.name}: the logits of {type(self.causal).__name__} are not its output layer applied to its "
                "last hidden states (a logit scale, or a head of its own kind): this architecture is not supported"
            )


def resolve_device(device: str) -> torch.device:
    """``auto`` is the accelerator where there is one, else the CPU."""
    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def load_language_model(config: ModelConfig) -> LanguageModel:
    """Load a frozen model and its tokenizer, by name or directory; a peft adapter's directory brings its base model.

    Raises:
        ModelError: There is no such model, it is not a causal language model, or it has no usable tokenizer.
    """
    tokenizer = load_tokenizer(config)
    model = _load_causal(config)
    language_model = LanguageModel(model, tokenizer, config.path)
    language_model.requires_grad_(False)
    return language_model.eval()


def load_trainable(config: PolicyConfig, seed: int) -> LanguageModel:
    """Load the model that a policy starts from; with ``from_scratch``, make it with random weights drawn from ``seed``.

    Raises:
        ModelError: As `load_language_model`.
    """
    if not config.from_scratch:
        return load_language_model(config)
    tokenizer = load_tokenizer(config)
    torch.manual_seed(seed)
    with _naming(config.path):
        architecture = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=DTYPES[config.dtype], attn_implementation=config.attention
        )
    return LanguageModel(model.to(resolve_device(config.device)), tokenizer, config.path)


def _load_causal(config: ModelConfig) -> PreTrainedModel | PeftModel:
    with _naming(config.path):
        if (Path(config.path) / "adapter_config.json").is_file():
            base = PeftConfig.from_pretrained(config.path).base_model_name_or_path
            return PeftModel.from_pretrained(_load_causal(config.model_copy(update={"path": base})), config.path)
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
        )
    return model.to(resolve_device(config.device))


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say which model could not be loaded; transformers' own messages say why."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model {path}: cannot be loaded as a causal language model: {error}") from error


def add_adapter(language_model: LanguageModel, adapter: AdapterConfig) -> LanguageModel:
    """Make what `adapter` names trainable and freeze the rest; a LoRA found in the model is merged first.

    Raises:
        ModelError: The adapter cannot be put on this model.
    """
    model = language_model.model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            if adapter.kind != "soft_prompt":
                raise ModelError(
                    f"model {language_model.name}: it is a soft prompt, which cannot be merged into weights: "
                    "train it on with policy.adapter.kind=soft_prompt, or start from its base model"
                )
            model.requires_grad_(False)
            model.prompt_encoder.requires_grad_(True)
            return language_model
        model = model.merge_and_unload()
    model.requires_grad_(adapter.kind == "full")
    if adapter.kind == "full":
        return LanguageModel(model, language_model.tokenizer, language_model.name)
    try:
        wrapped = get_peft_model(model, _peft_config(adapter, language_model))
    except (ValueError, OSError) as error:
        raise ModelError(f"model {language_model.name}: policy.adapter.kind={adapter.kind}: {error}") from error
    return LanguageModel(wrapped, language_model.tokenizer, language_model.name)


def _peft_config(adapter: AdapterConfig, language_model: LanguageModel) -> PeftConfig:
    if adapter.kind == "lora":
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=adapter.target_modules,
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=adapter.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT if adapter.init_text else PromptTuningInit.RANDOM,
        prompt_tuning_init_text=adapter.init_text,
        tokenizer_name_or_path=language_model.tokenizer.name_or_path if adapter.init_text else None,
    )


def save_pretrained(language_model: LanguageModel, directory: Path) -> None:
    """Write a directory that ``from_pretrained`` (and `load_language_model`) reads: weights or adapter, and tokenizer."""
    language_model.model.save_pretrained(directory)
    language_model.tokenizer.save_pretrained(directory)


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits that change when a weight does: names, shapes and the sums of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.state_dict().items()):
        total = parameter.double().sum().item() if parameter.is_floating_point() else int(parameter.sum())
        squares = parameter.double().square().sum().item() if parameter.is_floating_point() else 0.0
        digest.update(f"{name} {tuple(parameter.shape)} {total!r} {squares!r}\n".encode())
    return digest.hexdigest()[:16]
