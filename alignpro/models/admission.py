"""Which models are admitted: those for which this project computes what transformers computes.

A model is tried when it is loaded, so that no architecture or adapter is silently mishandled. Two sequences that share a
prompt run as they will in training (packed) and in generation (keys and values in pages: both prompts, then the next
tokens). Each pass must give the logits that transformers computes for each sequence alone. The same is done with every
length that the configuration names lowered to a few tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from alignpro.errors import ModelError
from alignpro.models.attention_interface import AttentionBackend, AttentionSettings
from alignpro.models.head import Head
from alignpro.models.paged_attention import PagedAttention, paged_trial
from alignpro.models.peft_types import is_peft_model
from alignpro.models.sequences import PackedSequences, SequenceBatch
from alignpro.models.thresholds import ORIGINAL_CONTEXT, Threshold, lowered, thresholds
from alignpro_kernels import cpp_library
from alignpro_kernels.reference import head_logits

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

_SOFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
"""Names of the kinds of soft prompts in peft."""
_PROMPT, _SHORT, _LONG = 3, 3, 9
"""Numbers of tokens of the prompt and of the two continuations that are tried."""
_AMPLIFIED = 1e-2
"""The greatest error of a token that amplifies rounding, relative to the logits' norm. 2e-4 was seen in a fine-tuned model of 30
layers."""
_LOWERED = _PROMPT + _SHORT
"""What lengths are lowered to: the shorter sequence stays within, the longer one exceeds it."""


class Candidate(Protocol):
    """What is tried of a `LanguageModel`; see there."""

    name: str
    model: PreTrainedModel | PeftModel

    @property
    def causal(self) -> PreTrainedModel: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def virtual_tokens(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def head(self) -> Head: ...
    def logits(self, ids: Tensor) -> Tensor: ...
    def hidden(self, ids: Tensor, attention_mask: Tensor) -> Tensor: ...
    def packed_states(self, packed: PackedSequences) -> Tensor: ...
    def token_states(self, ids: Tensor, positions: Tensor, attention: AttentionBackend) -> Tensor: ...
    def disable_adapter(self) -> AbstractContextManager[None]: ...


def check_adapter(name: str, soft_prompt: Any) -> None:
    """Refuse a soft prompt of an unsupported kind.

    Args:
        name: The model's name in messages.
        soft_prompt: The peft configuration of the active soft prompt, or None.

    Raises:
        ModelError: It is of another kind.
    """
    if soft_prompt is not None and soft_prompt.peft_type.value not in _SOFT_PROMPTS:
        raise ModelError(
            f"model {name}: a peft adapter of type {soft_prompt.peft_type.value} is not supported; "
            f"soft prompts are of type {' or '.join(_SOFT_PROMPTS)}"
        )


def check_layers(name: str, causal: PreTrainedModel) -> None:
    """Refuse layers that cannot share prefixes, and attention that does not compute what the configuration says.

    Raises:
        ModelError: The model has recurrent layers, or a soft cap that its attention ignores.
    """
    config = causal.config.get_text_config()
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        raise ModelError(
            f"model {name}: {type(causal).__name__} is not supported: it has recurrent layers, whose state "
            "does not allow padding and shared prefixes"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and config._attn_implementation == "sdpa":
        raise ModelError(
            f"model {name}: its attention scores have a soft cap ({softcap}), which attention=sdpa does not "
            "compute: set attention=eager (or flash_attention_2, where that is installed)"
        )


def check_finite(name: str, outputs: Tensor) -> None:
    """Refuse outputs that are NaN or infinite; waits for the device.

    Raises:
        ModelError: One of them is.
    """
    check_finite_sum(name, finite_sum(outputs).item())


def finite_sum(outputs: Tensor) -> Tensor:
    """The sum of outputs, () float32 or wider: it is not finite if one of them is not.

    It takes a twentieth of the time of `torch.isfinite` on a CPU.
    """
    return outputs.sum(dtype=torch.promote_types(outputs.dtype, torch.float32))


def check_finite_sum(name: str, total: float) -> None:
    """`check_finite` of outputs whose `finite_sum` is on the host already."""
    if not math.isfinite(total):
        raise ModelError(
            f"model {name}: its outputs are not finite: its weights hold NaN or infinity, or its dtype is too narrow "
            "(with float16, try bfloat16 or float32)"
        )


def _not_finite(model: PreTrainedModel) -> str | None:
    """Say which weight is not finite, or return None if all are."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            dtype = str(weight.dtype).removeprefix("torch.")
            return f"its weight {name} holds NaN or infinity in {dtype}: repair its files, or set a wider dtype"
    return None


def agree(logits: Tensor, expected: Tensor, model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether two computations of the logits of N tokens, (N, V) float32, differ by no more than rounding in ``dtype``.

    A fine-tuned model may amplify rounding a thousand times at a token here and there, so one token in six may differ by a
    percent in float32, and in 16 bits by four times what is usual. A mask or a position that is treated differently shows in
    more tokens, or by more.
    """
    # Each layer adds rounding errors of its own: 0.6 · eps · √layers were measured on random models.
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    usual = max(1e-4, 4 * math.sqrt(layers) * torch.finfo(dtype).eps)
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1).square().mean().sqrt()
    amplified = int((errors > usual).sum())  # not counted if a logit is NaN, which the next line refuses
    return bool(errors.max() <= max(4 * usual, _AMPLIFIED)) and amplified <= len(errors) // 6


class Trial:
    """What transformers computes for a few tokens, to be compared with this project's passes over the same weights.

    Args:
        model: The model, before anything in it is replaced.

    Raises:
        ModelError: Its outputs are not finite, or transformers cannot compute them.
    """

    def __init__(self, model: Candidate) -> None:
        self._model = model
        config = model.causal.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        usable = [i for i in range(model.vocabulary) if i != pad]
        ids = [usable[i % len(usable)] for i in range(_PROMPT + _SHORT + _LONG)]
        longest = min(_LONG, max(1, model.context_length - _PROMPT))
        self._prompt = ids[:_PROMPT]
        self._completions = [ids[_PROMPT : _PROMPT + min(_SHORT, longest)], ids[_PROMPT + _SHORT :][:longest]]
        named = thresholds(config)
        self._thresholds = [None, *(each for each in named if each.value > _LOWERED)]
        with _evaluating(model), torch.no_grad():
            self._expected = [self._plain(threshold) for threshold in self._thresholds]

    @torch.no_grad()
    def compare(self) -> int | None:
        """Compare the passes of this project with those of transformers, with the adapter on and off.

        Returns:
            The length up to which they agree; None if there is no limit.

        Raises:
            ModelError: They differ, or the model cannot be run in this way.
        """
        limit = None
        with _evaluating(self._model):
            for threshold, expected in zip(self._thresholds, self._expected, strict=True):
                with self._lowered(threshold):
                    difference = self._difference(expected, as_in_use=threshold is None)
                if difference is None:
                    continue
                if threshold is None or threshold.name != ORIGINAL_CONTEXT:
                    beyond = "" if threshold is None else f" beyond {threshold.name}={threshold.value}"
                    raise ModelError(f"model {self._model.name}: {difference}{beyond}: not supported")
                limit = threshold.value
                logger.warning(
                    "%s: sequences are limited to %d tokens (%s): beyond, its rotary embedding has other frequencies for "
                    "all tokens of a sequence",
                    self._model.name,
                    limit,
                    threshold.name,
                )
        return limit

    def _modes(self) -> Iterator[AbstractContextManager[None]]:
        if is_peft_model(self._model.model):
            yield self._model.disable_adapter()
        yield nullcontext()

    def _lowered(self, threshold: Threshold | None) -> AbstractContextManager[None]:
        return nullcontext() if threshold is None else lowered(self._model.causal, threshold, _LOWERED)

    def _plain(self, threshold: Threshold | None) -> list[list[Tensor]]:
        """The logits by transformers' own pass over each sequence alone, (L, V) each, by mode of the adapter."""
        found = []
        with self._lowered(threshold), self._unsupported():
            for mode in self._modes():
                with mode:
                    found.append([self._model.logits(ids)[0] for ids in self._rows()])
        for logits in itertools.chain.from_iterable(found):
            if not math.isfinite(finite_sum(logits).item()) and (weight := _not_finite(self._model.causal)) is not None:
                raise ModelError(f"model {self._model.name}: its outputs are not finite: {weight}")
            check_finite(self._model.name, logits)
        return found

    def _rows(self) -> list[Tensor]:
        return [torch.tensor([[*self._prompt, *each]], device=self._model.device) for each in self._completions]

    def _difference(self, expected: list[list[Tensor]], *, as_in_use: bool) -> str | None:
        """What is computed differently; None if nothing is.

        Args:
            expected: The logits of transformers.
            as_in_use: Whether generation may run as one fused operation, which keeps the lengths of the configuration.
        """
        model, kind = self._model, type(self._model.causal).__name__
        for logits, mode in zip(expected, self._modes(), strict=True):
            with mode, self._unsupported():
                last = self._rows()[-1]
                if not self._agree(model.hidden(last, torch.ones_like(last))[0], logits[-1]):
                    return (
                        f"the logits of {kind} are not its output layer applied to its last hidden states "
                        "(a logit scale, or a special head or adapter)"
                    )
                drawn = torch.cat([each[_PROMPT - 1 : -1] for each in logits])
                if not self._agree(self._packed_states(), drawn):
                    return (
                        f"the attention of {kind} treats positions or masks in a special way, so that sequences cannot "
                        "share their prompt"
                    )
                everything = torch.cat([logits[0][:_PROMPT], *(each[_PROMPT:] for each in logits)])
                if not self._agree(self._paged_states(as_in_use), everything):
                    return (
                        f"the attention of {kind} does not give the same over keys and values kept from earlier passes "
                        "(it may run more than once in a layer, or mask them in a special way)"
                    )
        return None

    def _agree(self, states: Tensor, expected: Tensor) -> bool:
        """Whether states, (N, D), have the expected logits, (N, V)."""
        head = self._model.head
        logits = head_logits(states, head.weight, head.bias, 1.0, head.softcap, head.lora).float()
        # With weights in bfloat16 the products of float32 states may be rounded to it, too.
        widened = states.device.type == "cpu" and states.dtype != self._model.causal.dtype == torch.bfloat16
        rounded = widened and cpp_library.unavailable() is None and cpp_library.state_parts() == 1
        dtype = torch.bfloat16 if rounded else states.dtype
        return agree(logits, expected, self._model.causal, dtype)

    def _packed_states(self) -> Tensor:
        """The states of all tokens but the first of the prompt and the last, sequence by sequence, as in training."""
        batch = SequenceBatch.build([self._prompt] * 2, self._completions, self._model.device)
        with torch.enable_grad():
            return self._model.packed_states(batch.pack(self._model.virtual_tokens)).detach()

    def _paged_states(self, as_in_use: bool) -> Tensor:
        """The states of the prompt, then of each continuation, as in generation."""
        prompt = [-1] * self._model.virtual_tokens + self._prompt
        states = paged_trial(self._model, prompt, self._completions, PagedAttention if as_in_use else _Unfused)
        return states[self._model.virtual_tokens :]

    @contextmanager
    def _unsupported(self) -> Iterator[None]:
        """Turn what a pass raises into an error that names the model."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (AttributeError, TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
            kind = type(self._model.causal).__name__
            raise ModelError(f"model {self._model.name}: {kind} is not supported: {error}") from error


class _Unfused:
    """Paged attention that the fused decoder does not recognise, so that each layer calls it."""

    def __init__(self, *arguments: Any) -> None:
        self._attention = PagedAttention(*arguments)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        return self._attention.attend(layer, query, key, value, settings)


@contextmanager
def _evaluating(model: Candidate) -> Iterator[None]:
    """Switch dropout off within the context."""
    modes = {module: module.training for module in model.model.modules()}
    model.model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
