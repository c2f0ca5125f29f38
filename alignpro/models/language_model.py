"""A language model as a decoder (tokens → hidden states) and a head (hidden states → logits).

The fused head operators need this split: they take hidden states and the head's weight, never logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from alignpro.errors import DataError, ModelError
from alignpro.models import admission
from alignpro.models.attention_interface import AttentionBackend, install_attention
from alignpro.models.cpu.packed_linear import PackedLinear
from alignpro.models.cpu.replacement import replace_modules, restore_modules
from alignpro.models.cpu.wide_states import has_wide_states, widen_states
from alignpro.models.head import Head
from alignpro.models.invocation import ActiveTokens, invocation_tokens
from alignpro.models.packed_attention import PackedAttention
from alignpro.models.peft_types import is_adapted_layer, is_lora_layer, is_peft_model
from alignpro.models.sequences import PackedSequences, SequenceBatch
from alignpro_kernels import LoRA

if TYPE_CHECKING:
    from peft import PeftModel


class LanguageModel(nn.Module):
    """A causal language model of transformers, with or without a peft adapter, and its tokenizer.

    Args:
        model: The model. A peft LoRA is active inside it; a peft soft prompt is prepended by `hidden`.
        tokenizer: Its tokenizer.
        name: Its name in messages: its path.

    Raises:
        ModelError: The passes of training or generation do not give the logits that transformers computes, which is tried
            on a few tokens (`admission`); they are not finite; or its adapter is of an unsupported kind.
    """

    invocation: tuple[int, ...]
    """The invocation tokens, from which an activated LoRA acts; empty without an activated LoRA."""
    is_base: bool
    """Whether this is a view without the adapter, as `without_adapter` returns."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.invocation = invocation_tokens(model) if is_peft_model(model) else ()
        self._soft_prompt_off = False
        self.is_base = False
        self._active: ActiveTokens | None = None
        self._adapted = [m for m in model.modules() if is_adapted_layer(m)]
        self._low_rank = [m for m in self._adapted if is_lora_layer(m)]
        self._checkpointed: list[GradientCheckpointingLayer] = []
        admission.check_adapter(name, self._soft_prompt)
        if self.invocation:
            self._active = self._install_token_lora()
        admission.check_layers(name, self.causal)
        self._softcap = getattr(self.causal.config.get_text_config(), "final_logit_softcapping", None)
        self._longest: int | None = None
        widen_states(self.causal)
        trial = admission.Trial(self)
        try:
            install_attention(self.causal)
        except ValueError as error:
            raise ModelError(f"model {name}: {type(self.causal).__name__} is not supported: {error}") from error
        self._packed_weights = replace_modules(self.causal)
        self._longest = trial.compare()

    def weights_updated(self) -> None:
        """Discard everything derived from the weights; to be called after their values have changed."""
        if self._packed_weights is not None:
            self._packed_weights.invalidate()

    def borrow_panels(self, others: Sequence[LanguageModel]) -> None:
        """Use the packed weights of the first of other models that holds all the linear layers in the same memory, if any."""
        own = self._packed_layers()
        for other in others:
            theirs = other._packed_layers()
            twins = {layer: theirs[name] for name, layer in own.items() if name in theirs}
            same = (layer.weight.data_ptr() == twin.weight.data_ptr() for layer, twin in twins.items())
            if own and len(twins) == len(own) and all(same):
                assert self._packed_weights is not None and other._packed_weights is not None  # they have packed layers
                if self._packed_weights is not other._packed_weights:
                    self._packed_weights.borrow(other._packed_weights, twins)
                return

    def _packed_layers(self) -> dict[str, nn.Linear]:
        """Name, without what an adapter adds to it → packed linear layer."""
        modules = self.causal.base_model.named_modules()
        return {name.removesuffix(".base_layer"): each for name, each in modules if isinstance(each, PackedLinear)}

    def disable_packing(self) -> None:
        """Keep no second layout of the weights: they are sharded and gathered anew for each pass."""
        restore_modules(self)
        self._packed_weights = None

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside a peft wrapper, or the model itself."""
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        return cast(PreTrainedModel, model)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.causal.device

    @property
    def states_dtype(self) -> torch.dtype:
        """The dtype of the hidden states: that of the weights, or float32 with weights in bfloat16 on a CPU (`wide_states`)."""
        return torch.float32 if has_wide_states(self.causal) else self.causal.dtype

    @property
    def context_length(self) -> int:
        """Maximum number of tokens in the model's context, excluding a soft prompt.

        If the frequencies of its rotary embedding depend on the length of the sequence (LongRoPE), these are the lengths
        at which all sequences have the same.
        """
        config = self.causal.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return int(limit if self._longest is None else min(limit, self._longest)) - self.virtual_tokens

    @property
    def vocabulary(self) -> int:
        """Number of token ids of the model: V."""
        embedding: nn.Module = self.causal.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        return len(embedding.weight)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The ids that end a turn, ascending: those of the generation config, the model's config and the tokenizer.

        Its chat template may end turns with yet another token (`ChatTemplate.stop_token_ids` has all of them).
        """
        config, generation = self.causal.config, getattr(self.causal, "generation_config", None)
        text = config.get_text_config()
        found: set[int] = set()
        for source in (config, text, generation, self.tokenizer):
            ids = getattr(source, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, Iterable) else set() if ids is None else {ids}
        return tuple(sorted(each for each in found if 0 <= each < text.vocab_size))  # the weights may be sharded

    @property
    def virtual_tokens(self) -> int:
        """Length of the soft prompt; 0 without one."""
        soft_prompt = self._soft_prompt
        return 0 if soft_prompt is None else int(soft_prompt.num_virtual_tokens)

    @property
    def graph_key(self) -> tuple[object, ...]:
        """The state that a captured CUDA graph depends on: the addresses of the weights and the state of adapters.

        A graph is out of date when this changes. In-place updates of the weights do not matter.
        """
        addresses = [x.data_ptr() for x in (*self.parameters(), *self.buffers())]
        adapters = [(layer.disable_adapters, tuple(layer.active_adapters)) for layer in self._adapted]
        low_rank = [(m.merged, tuple(m.scaling.items())) for m in self._low_rank]
        return (*addresses, *adapters, *low_rank)

    @property
    def head(self) -> Head:
        """The current output layer; a LoRA on it is kept separate from the weight."""
        layer = self.causal.get_output_embeddings()
        head = Head(layer.weight, getattr(layer, "bias", None), self._softcap)
        if self.is_base or not is_lora_layer(layer) or layer.disable_adapters or layer.merged:
            return head
        down: Any = layer.lora_A
        up: Any = layer.lora_B
        active = [(down[name].weight, up[name].weight, layer.scaling[name]) for name in layer.active_adapters]
        if not active:
            return head
        # Adapters may be float32 with 16-bit states. Several adapters form one of their summed rank.
        a = torch.cat([scale * a for a, _, scale in active]).to(self.states_dtype)
        b = torch.cat([b for _, b, _ in active], dim=1).to(self.states_dtype)
        return replace(head, lora=LoRA(a, b, 1.0))

    @property
    def base_head(self) -> Head:
        """The output layer without a LoRA."""
        layer = self.causal.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), self._softcap)

    def without_adapter(self) -> LanguageModel:
        """Return a view of the model without its LoRA; it shares the weights, and a pass may serve both (`token_states`).

        Raises:
            ModelError: There is no adapter, or it is not a LoRA that can be switched off per token.
        """
        self._active = self._active or self._install_token_lora()
        view = copy.copy(self)
        view.is_base, view.invocation = True, ()
        return view

    @property
    def has_token_lora(self) -> bool:
        """Whether its adapter is a LoRA that can be switched off for a subset of the tokens of a pass."""
        return self._active is not None

    @property
    def parts(self) -> tuple[LanguageModel, ...]:
        """The models whose logits it sums: itself, unless it is a mixture."""
        return (self,)

    def shares_weights(self, other: LanguageModel) -> bool:
        """Whether both are views of one model, with or without its adapter."""
        return len(self.parts) == len(other.parts) == 1 and self.causal is other.causal

    def action_states(self, batch: SequenceBatch) -> Tensor:
        """Compute the last hidden states at which the actions were chosen; shared prompts are computed once.

        Returns:
            (N, D) in `states_dtype`, in row-major order of the batch's mask.

        Raises:
            DataError: A prompt lacks the invocation tokens of an activated LoRA, or a sequence exceeds the context.
        """
        self.check_lengths(batch)
        return self.packed_states(batch.pack(self.virtual_tokens, self.invocation))

    def check_lengths(self, batch: SequenceBatch) -> None:
        """Refuse sequences beyond the lengths at which the rotary embedding has the same frequencies for all of them.

        Raises:
            DataError: A sequence is longer.
        """
        longest = max(len(x) + len(y) for x, y in zip(batch.prompts, batch.completions, strict=True))
        if self._longest is not None and longest > self.context_length:
            raise DataError(
                f"a sequence of {longest} tokens does not fit in the context of {self.context_length} tokens of {self.name}"
            )

    def packed_states(self, packed: PackedSequences) -> Tensor:
        """Compute the last hidden states at which actions were chosen, (N, D), of sequences that are packed already."""
        active = True if packed.active is None else packed.active
        attention = PackedAttention(packed.layout)
        states = self.token_states(packed.ids, packed.layout.positions, attention, active)
        return states.index_select(0, packed.state_indices)

    def token_states(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        active: Tensor | bool = True,
        *,
        soft_prompt: bool = True,
    ) -> Tensor:
        """Compute the last hidden states of T tokens that are packed into one row.

        Args:
            ids: (T,) int64; −1 for the virtual tokens of a soft prompt, which come first in their sequence.
            positions: (T,) int64: position of each token in its sequence.
            attention: Defines which tokens attend to which, and where keys and values are stored.
            active: (A,) int64: the tokens that a token LoRA (`has_token_lora`) acts on; True for all, False for none.
            soft_prompt: False if there are no virtual tokens among them; this avoids a synchronisation with the device.

        Returns:
            (T, D) in `states_dtype`.
        """
        inputs: dict[str, Any] = {"input_ids": ids[None]}
        if soft_prompt and self.virtual_tokens:
            soft = cast("PeftModel", self.model).get_prompt(batch_size=1)[0]  # (prefix, D)
            embedded = self.causal.get_input_embeddings()(ids.clamp_min(0))  # (T, D)
            virtual = ids < 0
            prompt = soft.to(embedded.dtype).index_select(0, positions[virtual])
            inputs = {"inputs_embeds": embedded.masked_scatter(virtual[:, None], prompt)[None]}
        with self._checkpointing(), self._with_active(active):
            output = self.causal.base_model(
                **inputs,
                # transformers takes a mask of four dimensions as it is, and so does not build one of T × T.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
                position_ids=positions[None],
                use_cache=False,
                attention_backend=attention,
            )
        states: Tensor = output.last_hidden_state[0]
        return states

    def hidden(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the last hidden states; an activated LoRA acts on all tokens.

        Args:
            ids: (B, L) int64, padded on either side.
            attention_mask: (B, L) bool or int64, zero at padding. It does not cover a soft prompt, whose part is added
                here.

        Returns:
            (B, L, D) in `states_dtype`.
        """
        inputs: dict[str, Any] = {"input_ids": ids}
        attention_mask = attention_mask.to(torch.int64)
        if prefix := self.virtual_tokens:
            source = _after_padding(attention_mask, prefix)
            attention_mask = nn.functional.pad(attention_mask, (prefix, 0), value=1).gather(1, source)
            soft = cast("PeftModel", self.model).get_prompt(batch_size=len(ids))  # (B, prefix, D)
            embedded = self.causal.get_input_embeddings()(ids)
            both = torch.cat([soft.to(embedded.dtype), embedded], dim=1)
            inputs = {"inputs_embeds": both.gather(1, source.unsqueeze(-1).expand_as(both))}
        with self._checkpointing(), self._with_active(True):
            output = self.causal.base_model(
                **inputs,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp_min(0),
                use_cache=False,
            )
        return output.last_hidden_state[:, -ids.shape[1] :]

    def logits(self, ids: Tensor) -> Tensor:
        """Compute the logits by transformers' own forward pass, (B, L, V) float32; an activated LoRA acts on all tokens."""
        model = self.causal if self._soft_prompt is None else self.model
        with self._with_active(True):
            logits: Tensor = model(input_ids=ids).logits[:, -ids.shape[1] :].float()
        return logits

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the adapter off within the context.

        Unlike peft's own switch, this does not traverse the whole model, which takes longer than a forward pass for small
        models; and a frozen adapter stays frozen.
        """
        off = self._soft_prompt_off
        disabled = [layer.disable_adapters for layer in self._adapted]
        trained = [weight for layer in self._adapted for weight in layer.parameters() if weight.requires_grad]
        self._soft_prompt_off = True
        try:
            for layer in self._adapted:
                layer.enable_adapters(False)
            yield
        finally:
            self._soft_prompt_off = off
            for layer, before in zip(self._adapted, disabled, strict=True):
                layer.enable_adapters(not before)
                layer.requires_grad_(False)
            for weight in trained:
                weight.requires_grad_(True)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of layers for the backward pass, and recompute the rest.

        Raises:
            ModelError: The architecture does not support it, or its layers have dropout. The layer's training mode
                switches both dropout and transformers' checkpointing, so they could not be told apart.
        """
        try:
            self.causal.gradient_checkpointing_enable(self.checkpoint_options)
        except ValueError as error:
            raise ModelError(f"model {self.name}: gradient_checkpointing: {error}") from error
        layers = [module for module in self.causal.modules() if isinstance(module, GradientCheckpointingLayer)]
        dropout = max((rate for m in layers if isinstance(rate := getattr(m, "dropout", 0.0), float)), default=None)
        if dropout is None or dropout > 0:
            raise ModelError(
                f"model {self.name}: gradient_checkpointing is not supported for {type(self.causal).__name__}"
                + (f", whose layers have dropout={dropout}: set it to 0 in its config" if dropout else "")
            )
        self._checkpointed = layers

    @property
    def checkpoint_options(self) -> dict[str, Any]:
        """Keyword arguments of `torch.utils.checkpoint`."""
        return {"use_reentrant": False} | ({"context_fn": self._active.checkpoint_contexts} if self._active else {})

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Put layers in training mode, which switches checkpointing on; the modules inside them keep their mode."""
        layers = self._checkpointed if torch.is_grad_enabled() else []
        before = [layer.training for layer in layers]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer, mode in zip(layers, before, strict=True):
                layer.training = mode

    def _with_active(self, active: Tensor | bool) -> AbstractContextManager[None]:
        return nullcontext() if self._active is None else self._active.set(False if self.is_base else active)

    def _install_token_lora(self) -> ActiveTokens:
        try:
            if not is_peft_model(self.model):
                raise ValueError("it has no adapter")
            from alignpro.models.token_lora import install_token_lora  # with peft, which few models need

            return install_token_lora(self.model)
        except ValueError as error:
            raise ModelError(f"model {self.name}: {error}") from error

    @property
    def _soft_prompt(self) -> Any:
        """The peft configuration of the active soft prompt, or None."""
        if not is_peft_model(self.model) or self._soft_prompt_off:
            return None
        config: Any = self.model.active_peft_config
        return config if config.is_prompt_learning else None


def _after_padding(mask: Tensor, count: int) -> Tensor:
    """Return gather indices that move ``count`` tokens from the front of each row to just after its left padding.

    A soft prompt must be adjacent to the text: a sliding window would count the padding between them.

    Args:
        mask: (B, S), zero at padding.
        count: Number of tokens in front of each row.

    Returns:
        (B, count + S) int64.
    """
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # (B, 1)
    index = torch.arange(count + mask.shape[1], device=mask.device)
    return torch.where(index < padding, index + count, torch.where(index < padding + count, index - padding, index))
