"""Semantic similarity of a rewrite to its prompt, measured with a text encoder."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel

from alignpro.config import ModelConfig
from alignpro.errors import ModelError
from alignpro.models.loading import resolve_device, resolve_dtype
from alignpro.models.pickled_files import describe_refusal
from alignpro.prompting.tokenization import load_tokenizer
from alignpro.rewards.model import pad_right, usable_length

_BATCH = 32
_MAX_LENGTH = 512


class EmbeddingSimilarity:
    """Cosine similarity, in [−1, 1], of the mean-pooled last hidden states of two texts (Reimers & Gurevych, 2019).

    Texts are truncated at the end to the encoder's maximum length (at most 512 tokens). The similarity of an empty text
    is 1.0 to another empty text, and 0.0 to any other.

    Raises:
        ModelError: The encoder or its tokenizer cannot be loaded, or it has no pad token.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._tokenizer = load_tokenizer(config, require_chat_template=False, require_pad_token=True)
        try:
            model = AutoModel.from_pretrained(
                config.path,
                dtype=resolve_dtype(config, widened=False),
                attn_implementation=config.attention,
                trust_remote_code=config.trust_remote_code,
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelError(f"encoder {config.path}: cannot be loaded: {error}") from error
        except (pickle.UnpicklingError, EOFError) as error:
            raise ModelError(f"encoder {config.path}: {describe_refusal(config.path, error)}") from error
        model.requires_grad_(False)
        self._model = model.eval().to(resolve_device(config.device))
        self._max_length = usable_length(self._model.config, self._tokenizer, _MAX_LENGTH)

    def __call__(self, originals: Sequence[str], rewrites: Sequence[str]) -> list[float]:
        """Compute (N,) cosines. A text that occurs repeatedly, such as the prompt of a group, is encoded once."""
        distinct = sorted({text.strip() for text in (*originals, *rewrites)} - {""}, key=len, reverse=True)
        vectors = dict(zip(distinct, self._embed(distinct), strict=True))
        similarities = []
        for x, x2 in zip(originals, rewrites, strict=True):
            first, second = vectors.get(x.strip()), vectors.get(x2.strip())
            if first is None or second is None:
                similarities.append(float(first is None and second is None))
            else:
                similarities.append(float(torch.dot(first, second)))
        return similarities

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as (N, D) float32 unit vectors."""
        batches = [torch.empty(0, 0)]
        for start in range(0, len(texts), _BATCH):
            rows = [
                self._tokenizer(text, truncation=True, max_length=self._max_length)["input_ids"]
                for text in texts[start : start + _BATCH]
            ]
            # A tokenizer may drop all characters of a text, which is then represented by a single pad token.
            ids, mask = pad_right(
                [row or [self._tokenizer.pad_token_id] for row in rows],
                self._tokenizer.pad_token_id,
                self._model.device,
            )
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, L, D)
            weight = mask[:, :, None].float()
            mean = (hidden * weight).sum(1) / weight.sum(1)
            batches.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(batches[1:]) if len(batches) > 1 else batches[0]
