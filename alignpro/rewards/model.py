"""A sequence classifier with one output as a reward: it scores (prompt, response) in its own chat template."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignpro.config import ModelConfig, ModelRewardConfig, TrainableModelConfig
from alignpro.data import Prompt
from alignpro.errors import ModelError
from alignpro.models.admission import check_finite
from alignpro.models.frozen_layers import replace_frozen_layers
from alignpro.models.loading import base_of_adapter, is_adapter, resolve_device, resolve_dtype, settle_dtype
from alignpro.models.pickled_files import describe_refusal
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.length_filter import filter_refused_prompts
from alignpro.prompting.tokenization import load_tokenizer
from alignpro.rewards.component import Measurement
from alignpro.rewards.conversation import encode_conversation


class SequenceRewardModel(nn.Module):
    """A transformers sequence classifier with one output, and its tokenizer. Used for scoring and for training.

    Args:
        classifier: The model; batches are padded with the pad token of its configuration.
        tokenizer: The tokenizer, which must have a chat template.
        max_length: Maximum number of tokens of a conversation; the model's own limits also apply.
    """

    def __init__(self, classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer)
        self.max_length = usable_length(classifier.config, tokenizer, max_length)

    def forward(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Rewards (B,) float32 of B conversations in one pass; differentiable in the trainable parameters."""
        return self.score([self.encode(x, y)[0] for x, y in zip(prompts, responses, strict=True)])

    def encode(self, prompt: Prompt, response: str) -> tuple[list[int], bool]:
        """The tokens of the conversation, and whether it was truncated on the left; see `encode_conversation`."""
        return encode_conversation(self.chat, prompt, response, self.max_length)

    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rewards (B,) float32 of B encoded conversations in one pass."""
        # The classifier finds the last token of a row by this id; with a different pad token it would score the padding.
        pad = self.classifier.config.get_text_config().pad_token_id
        ids, mask = pad_right(rows, pad, self.classifier.device)
        rewards: Tensor = self.classifier(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        return rewards


_PROBE = Prompt.from_text("x")

LoadRewardModel = Callable[[ModelConfig, Callable[[ModelConfig], SequenceRewardModel]], SequenceRewardModel]
"""Loads a reward model, given its configuration and the function that loads it whole."""


class ModelReward:
    """Reward component: ``scale * r + offset`` of a frozen `SequenceRewardModel` on (original prompt, response).

    Args:
        config: The model and the scaling of its scores.
        load: Loads the model in place of `load_reward_model`, for example sharded over ranks.

    Raises:
        ModelError: The model cannot be loaded, has no trained score head of one output, or no chat template.
    """

    def __init__(self, config: ModelRewardConfig, load: LoadRewardModel | None = None) -> None:
        self.name = config.name or Path(config.model.path).name
        self._config = config
        plainly = partial(load_reward_model, max_length=config.max_length)
        self._model = plainly(config.model) if load is None else load(config.model, plainly)

    def scorable(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that its template takes; the others are counted in a warning."""
        return filter_refused_prompts(prompts, self.check, input_name=f"the input of the reward {self.name!r}")

    def check(self, prompt: Prompt) -> None:
        """Raise if no response to this prompt can be scored.

        Raises:
            RewardError: The chat template refuses the conversation.
        """
        self._model.encode(prompt, "a response")

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], rewrites: Sequence[str] | None = None
    ) -> Measurement:
        """Score (N,) rows; the metric ``truncated`` is 1.0 for conversations that were truncated on the left.

        Rows are batched by length to reduce padding, and returned in their original order.
        """
        encoded = [self._model.encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        rows = [ids for ids, _ in encoded]
        order = sorted(
            range(len(rows)), key=lambda i: len(rows[i]), reverse=True
        )  # longest first, so that running out of memory shows early
        scores = torch.empty(len(rows), dtype=torch.float64)
        for start in range(0, len(order), self._config.batch_size):
            chosen = order[start : start + self._config.batch_size]
            scores[chosen] = self._model.score([rows[i] for i in chosen]).double().cpu()
        values = (scores * self._config.scale + self._config.offset).tolist()
        return Measurement(values, {"truncated": [float(truncated) for _, truncated in encoded]})


def load_reward_model(config: ModelConfig, max_length: int, *, seed: int | None = None) -> SequenceRewardModel:
    """Load a reward model and its tokenizer on their device, frozen and in evaluation mode; an adapter is merged.

    Args:
        config: The model and its tokenizer.
        max_length: Maximum number of tokens of a conversation.
        seed: None for a model used for scoring, whose checkpoint must be complete. For a model to be trained, the seed
            that initialises the score head if the checkpoint (such as a causal language model's) does not have one.

    Raises:
        ModelError: The model or tokenizer cannot be loaded, there is no chat template or usable pad token, the model does
            not have exactly one output, its outputs are not finite, or a model used for scoring has no score head in its
            checkpoint.
    """
    tokenizer = load_tokenizer(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            classifier, missing = _load_classifier(config, num_labels=None if seed is None else 1)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ModelError(f"reward model {config.path}: cannot be loaded as a sequence classifier: {error}") from error
    except AssertionError as error:  # of torch: transformers' embeddings take the pad id as it is
        raise ModelError(
            f"reward model {config.path}: its config.json names a pad_token_id beyond its vocabulary: {error}"
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise ModelError(f"reward model {config.path}: {describe_refusal(config.path, error)}") from error
    if missing and seed is None:
        raise ModelError(
            f"reward model {config.path}: the checkpoint lacks {', '.join(missing)}, which would be random; "
            "give a sequence classifier (`alignpro reward` trains one), not a language model"
        )
    if classifier.config.num_labels != 1:
        raise ModelError(
            f"reward model {config.path}: it has {classifier.config.num_labels} outputs, "
            "a reward needs exactly 1 (num_labels=1)"
        )
    placed: Any = classifier.requires_grad_(False).eval()  # PreTrainedModel.to is not typed
    model = SequenceRewardModel(placed.to(resolve_device(config.device)), tokenizer, max_length)
    probe, _ = model.encode(_PROBE, "x")
    classifier.config.get_text_config().pad_token_id = _pad_token(classifier, tokenizer, config, ends_with=probe[-1])
    with torch.inference_mode():
        check_finite(config.path, model.score([probe]))
    if seed is None:
        replace_frozen_layers(classifier, f"reward model {config.path}")
    return model


def _load_classifier(config: ModelConfig, num_labels: int | None) -> tuple[PreTrainedModel, list[str]]:
    """Load a classifier and list the weights that its checkpoint lacks; an adapter is merged into its base model."""
    if is_adapter(config.path):
        return _load_adapted(config), []
    overrides: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    if isinstance(config, TrainableModelConfig) and config.from_scratch:
        architecture = AutoConfig.from_pretrained(config.path, **overrides)
        return AutoModelForSequenceClassification.from_config(architecture, dtype=resolve_dtype(config)), []
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        config.path,
        dtype=resolve_dtype(config),
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        **overrides,
    )
    settle_dtype(classifier, config)
    return classifier, sorted(report["missing_keys"])


def _load_adapted(config: ModelConfig) -> PreTrainedModel:
    """Load a peft adapter that holds a score head on its base model, and merge it.

    Raises:
        ValueError: It is an adapter of another kind, has no score head, or its base model lacks other weights.
    """
    from peft import PeftConfig, PeftModel, TaskType

    adapter = PeftConfig.from_pretrained(config.path)
    trained = tuple(getattr(adapter, "modules_to_save", None) or ())
    if adapter.task_type != TaskType.SEQ_CLS:
        raise ValueError(f"its peft adapter is of task {adapter.task_type}: a reward needs one of task SEQ_CLS")
    base = config.model_copy(update={"path": base_of_adapter(Path(config.path))})
    classifier, missing = _load_classifier(base, num_labels=1)
    if random := [name for name in missing if name.split(".")[0] not in trained]:
        raise ValueError(f"adapter and base model {base.path} lack {', '.join(random)}, which would be random")
    merged: PreTrainedModel = PeftModel.from_pretrained(classifier, config.path).merge_and_unload()
    return merged


def usable_length(model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The maximum row length in tokens: ``max_length``, limited by the model's positions and the tokenizer."""
    positions = getattr(model.get_text_config(), "max_position_embeddings", None) or max_length
    return int(min(max_length, positions, tokenizer.model_max_length))


def pad_right(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows on the right, so that positions start at 0. Returns ids (B, L) int64 and mask (B, L) int64."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _pad_token(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, ends_with: int
) -> int:
    """Choose the pad token: the configured one, else the model's own, which it was trained with, else the tokenizer's.

    A classifier reads the score at the last token that is not this one, so a token that ends the conversations would move
    it, unless the model was trained so.

    Raises:
        ModelError: There is none, the tokenizer's ends the conversations, or it is beyond the model's vocabulary.
    """
    embedding: Any = classifier.get_input_embeddings()
    own, size = classifier.config.get_text_config().pad_token_id, len(embedding.weight)
    pad = own if config.pad_token is None and own is not None and own >= 0 else tokenizer.pad_token_id
    if pad is None or (pad != own and config.pad_token is None and pad == ends_with):
        fits = [each for each in tokenizer.all_special_ids if each < size and each not in (ends_with, pad)]
        unknown = [each for each in fits if each == tokenizer.unk_token_id]
        hint = "".join(f", such as {tokenizer.convert_ids_to_tokens(each)}" for each in (unknown or fits)[:1])
        has = "has no pad token" if pad is None else f"pads with {tokenizer.pad_token}, which ends its conversations"
        raise ModelError(
            f"reward model {config.path}: its tokenizer {has}, and its config.json names none: set pad_token to a token "
            f"that ends no conversation{hint}: the score is read at the last token that is not the pad token"
        )
    if pad >= size:
        raise ModelError(
            f"reward model {config.path}: its pad token {tokenizer.convert_ids_to_tokens(pad)} has id {pad}, and the model "
            f"has {size} embeddings: set pad_token to a token that it has, or resize its embeddings"
        )
    return int(pad)
