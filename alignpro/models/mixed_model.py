"""Several models of one vocabulary as one, whose next-token logits are a weighted sum of theirs.

    z = Σ_k w_k z_k,   Σ_k w_k = 1             log-linear mixture of the next-token distributions

The parts run one after another in each pass. Each layer of each part is a layer of the mixture, with keys and values of its
own, so engine, scheduler and prefix cache see one model with more layers. The sum is left to the head: logits are linear in
hidden states, so with heads W_k, Σ_k w_k W_k h_k is one head [w_1 W_1 … w_K W_K] on the concatenated states; and if the parts
share one head W, it is W on Σ_k w_k h_k. So samplers, filters and log-probabilities are those of any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from alignpro.errors import ModelError
from alignpro.models.attention_interface import AttentionBackend, AttentionSettings
from alignpro.models.head import Head
from alignpro.models.language_model import LanguageModel
from alignpro.models.paged_attention import PagedAttention, layer_keys


def mix_models(
    prompters: Sequence[LanguageModel], weights: Sequence[float], reference: LanguageModel, name: str
) -> LanguageModel:
    """Return the model whose next-token logits are Σ_k w_k z_k + (1 − Σ_k w_k) z_sft.

    A part of weight 0 is left out. If a single part is left, it is returned as it is, so that its samples keep every bit.

    Args:
        prompters: K frozen models.
        weights: (K,) w; any real numbers.
        reference: The frozen ρ_sft; of a LoRA's prompter, a view without the adapter saves the memory of a second model.
        name: Name of the mixture in messages.

    Raises:
        ModelError: The models cannot be mixed; see `MixedModel`.
    """
    rest = 1.0 - sum(weights)
    given = zip([*prompters, reference], [*weights, rest if abs(rest) > _ROUNDING else 0.0], strict=True)
    return combine([(model, weight) for model, weight in given if weight != 0], name)


def combine(parts: Sequence[tuple[LanguageModel, float]], name: str) -> LanguageModel:
    """Return the mixture of models with weights other than 0, of sum 1; a single model as it is, and mixtures by their parts.

    Raises:
        ModelError: The models cannot be mixed; see `MixedModel`.
    """
    if len(parts) == 1:
        return parts[0][0]
    single: list[tuple[LanguageModel, float]] = []
    for model, weight in parts:
        own = zip(model.parts, model.weights, strict=True) if isinstance(model, MixedModel) else [(model, 1.0)]
        single += [(part, weight * share) for part, share in own]
    return MixedModel([part for part, _ in single], [weight for _, weight in single], name)


class MixedModel(LanguageModel):
    """A mixture of two or more frozen models, for generation and scoring.

    Args:
        parts: The models; the first one's tokenizer is the mixture's.
        weights: One per part, of sum 1.
        name: Its name in messages.

    Raises:
        ModelError: The parts differ in vocabulary, dtype, device or invocation, one has a soft prompt, or one caps its
            logits, which are then not linear in its states.
    """

    def __init__(self, parts: Sequence[LanguageModel], weights: Sequence[float], name: str) -> None:
        nn.Module.__init__(self)
        self.training = False
        self.mixed = nn.ModuleList(parts)
        self.weights = tuple(weights)
        self.name = name
        self.tokenizer = parts[0].tokenizer
        self.is_base = False
        check_mixable(name, parts)
        invocations = {part.invocation for part in parts if part.invocation}
        self.invocation = next(iter(invocations), ())
        counts = [len(layer_keys(part)) for part in parts]
        self._layers = [range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
        limits = [part.context_length for part in parts if part._longest is not None]
        self._longest = min(limits, default=None)
        self._head = self._mixed_head()

    @property
    def parts(self) -> tuple[LanguageModel, ...]:
        return tuple(part for part in self.mixed if isinstance(part, LanguageModel))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def context_length(self) -> int:
        return min(part.context_length for part in self.parts)

    @property
    def vocabulary(self) -> int:
        return min(part.vocabulary for part in self.parts)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return self.parts[0].end_token_ids

    @property
    def virtual_tokens(self) -> int:
        return 0

    @property
    def graph_key(self) -> tuple[object, ...]:
        return tuple(part.graph_key for part in self.parts)

    @property
    def head(self) -> Head:
        return self._head

    @property
    def base_head(self) -> Head:
        return self._head

    @property
    def has_token_lora(self) -> bool:
        return bool(self.invocation)

    def weights_updated(self) -> None:
        for part in self.parts:
            part.weights_updated()
        self._head = self._mixed_head()

    def token_states(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        active: Tensor | bool = True,
        *,
        soft_prompt: bool = True,
    ) -> Tensor:
        """Compute the states of all parts, (T, D) summed or (T, Σ D_k) concatenated, as `head` takes them."""
        states = [
            part.token_states(
                ids, positions, _of_layers(attention, layers), active if part.invocation else True, soft_prompt=False
            )
            for part, layers in zip(self.parts, self._layers, strict=True)
        ]
        if not self._one_head:
            return torch.cat(states, dim=1)
        wide = torch.promote_types(states[0].dtype, torch.float32)  # 16-bit states are rounded once
        mixed = self.weights[0] * states[0].to(wide)
        for weight, state in zip(self.weights[1:], states[1:], strict=True):
            mixed += weight * state.to(wide)
        return mixed.to(states[0].dtype)

    def logits(self, ids: Tensor) -> Tensor:
        parts = zip(self.weights, self.parts, strict=True)
        return torch.stack([weight * part.logits(ids) for weight, part in parts]).sum(0)

    def without_adapter(self) -> LanguageModel:
        return self.parts[0].without_adapter()

    @torch.no_grad()
    def _mixed_head(self) -> Head:
        heads = [part.head for part in self.parts]
        self._one_head = all(head.lora is None and head.shares_storage_with(heads[0]) for head in heads)
        if self._one_head:
            return heads[0]
        weight = torch.cat([w * head.merged for w, head in zip(self.weights, heads, strict=True)], dim=1)
        biases = [w * head.bias for w, head in zip(self.weights, heads, strict=True) if head.bias is not None]
        return Head(weight, torch.stack(biases).sum(0) if biases else None, None)


@dataclass(frozen=True)
class _LayersFrom:
    """The attention of a part whose layer 0 is layer ``first`` of the mixture."""

    attention: AttentionBackend
    first: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        return self.attention.attend(self.first + layer, query, key, value, settings)


_ROUNDING = 1e-9
"""Weights whose sum is this close to 1 leave nothing to the reference."""


def share_equal_weights(models: Sequence[LanguageModel]) -> int:
    """Let models hold equal weights of the same name once, such as the base of two LoRAs; returns the bytes saved.

    Weights that require a gradient are left alone; the others must not be trained afterwards. On a CPU, layers that come to
    share all their weights with one of a model before them share their packed panels, too.
    """
    held: dict[str, list[Tensor]] = {}
    saved, parts = 0, [part for each in models for part in each.parts]
    for i, model in enumerate(parts):
        changed = 0
        for name, weight in model.causal.named_parameters():
            if weight.requires_grad:
                continue
            others = held.setdefault(name.replace(".base_layer.", "."), [])
            equal = (other for other in others if other.data_ptr() != weight.data_ptr() and _equal(other, weight))
            if (other := next(equal, None)) is not None:
                changed += weight.nbytes
                weight.data = other.data
            else:
                others.append(weight)
        if changed:
            model.weights_updated()
            model.borrow_panels(parts[:i])
        saved += changed
    return saved


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def _of_layers(attention: AttentionBackend, layers: range) -> AttentionBackend:
    if isinstance(attention, PagedAttention):  # which the fused decoder of a CPU recognises by its class
        own = attention.layers[layers.start : layers.stop]
        return PagedAttention(own, attention.slots, attention.levels, attention.in_order)
    return _LayersFrom(attention, layers.start)


def check_mixable(name: str, parts: Sequence[LanguageModel]) -> None:
    """Check that models can be mixed, before anything is sampled from them.

    Args:
        name: Of the mixture, for the message.
        parts: The models, which are no mixtures themselves.

    Raises:
        ModelError: They cannot; see `MixedModel`.
    """
    first = parts[0]
    for part in parts:
        heads = (first.head.weight, part.head.weight)
        facts = {
            "vocabulary": tuple(len(weight) for weight in heads),
            "dtype": tuple(weight.dtype for weight in heads),
            "device": (first.device, part.device),
        }
        for what, (of_first, own) in facts.items():
            if of_first != own:
                raise ModelError(
                    f"model {name}: {first.name} has {what} {of_first}, {part.name} {own}: models that are mixed need the same"
                )
        if part.virtual_tokens:
            raise ModelError(
                f"model {name}: {part.name} has a soft prompt, which the other models do not: it cannot be mixed"
            )
        if part.head.softcap is not None:
            raise ModelError(
                f"model {name}: {part.name} has final_logit_softcapping={part.head.softcap}: capped logits are not linear in "
                "the hidden states, so they cannot be mixed in one pass of the head"
            )
    if len({part.invocation for part in parts if part.invocation}) > 1:
        raise ModelError(
            f"model {name}: its parts are activated LoRAs with different invocations: they cannot be mixed"
        )
