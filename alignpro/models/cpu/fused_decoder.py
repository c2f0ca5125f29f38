"""All decoder layers of a model on a CPU in one call, for passes without gradients over a paged pool of keys and values.

`alignpro_kernels.decoder` computes layers like Llama's: RMS norms, rotary embeddings, a gated MLP with SiLU, and, if a
model has them, biases and norms of queries and keys. Whether a model's layers are of this kind is tested, not assumed:
both implementations compute the states of a few tokens. A model with other layers keeps its own forward pass, and so does
one whose layers have hooks, or an adapter other than a LoRA on their projections (`decoder_lora`), at the time of a pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from alignpro.models.attention_interface import AttentionSettings
from alignpro.models.cpu.decoder_lora import AdaptedProjection, UnsupportedError, base_of, collect, everywhere
from alignpro.models.cpu.fused_layers import FusedRMSNorm, mix_in
from alignpro.models.cpu.packed_linear import PackedLinear, PackedWeights, weights_version
from alignpro.models.cpu.rotary_table import RotaryTable
from alignpro.models.paged_attention import PagedAttention
from alignpro.models.thresholds import thresholds
from alignpro_kernels import PagedKeys, cpp_library
from alignpro_kernels.decoder import DecoderLayer, DecoderLoRA, DecoderWeights, decoder_stack

logger = logging.getLogger(__name__)

_SEPARATE = "layers of %s run as separate operations on the CPU: %s"
_PROBE_TOKENS = 5  # on which both implementations are compared


class _LastStates(NamedTuple):
    """The part of a transformers model's output that generation reads; making the whole takes longer than a layer."""

    last_hidden_state: Tensor
    """(1, T, D)"""


class _FusedDecoder(nn.Module):
    """A transformers model without its head, whose layers may run as one call."""

    fused_layers: _DecoderLayers

    def forward(self, *args: Any, **options: Any) -> Any:
        """See the model's own forward pass, which also runs when the fused one does not apply."""
        attention = options.get("attention_backend")
        if args or torch.is_grad_enabled() or not isinstance(attention, PagedAttention):
            return super().forward(*args, **options)
        try:
            lora = self.fused_layers.current_lora()
        except UnsupportedError as reason:
            self.fused_layers.announce(reason)
            return super().forward(*args, **options)
        states = self.fused_layers.states(
            options.get("input_ids"), options.get("inputs_embeds"), options["position_ids"], attention, lora
        )
        return _LastStates(states)


def fuse_decoder(model: nn.Module, packed_weights: PackedWeights) -> None:
    """Run a model's layers as one call in the passes of generation, if they are of the supported kind.

    Args:
        model: The model without its head, after `fuse_layers`.
        packed_weights: The packed weights of its linear layers.
    """
    if isinstance(model, _FusedDecoder) or cpp_library.unavailable() is not None:
        return
    name = type(model).__name__
    try:
        layers = _probe(model, packed_weights)
    except UnsupportedError as reason:
        logger.info(_SEPARATE, name, reason)
        return
    mix_in(model, _FusedDecoder)
    assert isinstance(model, _FusedDecoder)
    model.fused_layers = layers
    logger.info("layers of %s run as one operation in generation on the CPU", name)


def unfuse_decoder(model: nn.Module) -> None:
    """Undo `fuse_decoder`."""
    for module in model.modules():
        if isinstance(module, _FusedDecoder):
            module.__class__ = type(module).__mro__[2]
            del module.fused_layers


@dataclass(frozen=True)
class _AttentionCall:
    """How a layer calls its attention."""

    pages: Tensor
    """(1, 2, page_size, kv_heads, head_dim): the keys and values that were written."""
    settings: AttentionSettings


class _AttentionRecorder:
    """Computes the attention of a few tokens to themselves and records how it is called."""

    def __init__(self, tokens: int) -> None:
        self.calls: dict[int, _AttentionCall] = {}
        self._tokens = tokens

    def over(self, pages: Sequence[Tensor]) -> PagedAttention:
        """Return the same attention over the given pages."""
        count = torch.tensor([self._tokens], dtype=torch.int32)
        positions = torch.arange(self._tokens, dtype=torch.int32)
        first = torch.zeros(1, dtype=torch.int32)
        level = PagedKeys(torch.cat([first, count]), first[None], count, positions, first)
        return PagedAttention(pages, positions.long(), [level])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`; records the arguments of the call."""
        if key.shape != value.shape:
            raise UnsupportedError("its keys and values differ in shape")
        pages = key.new_zeros(1, 2, self._tokens, key.shape[1], key.shape[3])
        self.calls[layer] = _AttentionCall(pages, settings)
        return self.over([pages]).attend(0, query, key, value, settings)


@torch.no_grad()
def _probe(model: Any, packed_weights: PackedWeights) -> _DecoderLayers:
    """Return the model's layers after comparing the operator with the model's own forward pass on a few tokens.

    Raises:
        UnsupportedError: They are of another kind.
    """
    parts = [_LayerModules.of(layer) for layer in getattr(model, "layers", ())]
    if not parts or not all(hasattr(model, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        raise UnsupportedError("its modules have other names")
    layers = None
    for start in _starts(model.config):
        ids, recorder = torch.arange(_PROBE_TOKENS)[None], _AttentionRecorder(_PROBE_TOKENS)
        with everywhere(model):
            expected = model(
                input_ids=ids,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
                position_ids=ids + start,
                use_cache=False,
                attention_backend=recorder,
            ).last_hidden_state
            calls = [recorder.calls.get(layer) for layer in range(len(parts))]
            layers = layers or _DecoderLayers(model, packed_weights, parts, calls)
            lora = layers.current_lora()
        pages = [call.pages.clone() for call in calls if call is not None]
        states = layers.states(ids, None, ids + start, recorder.over(pages), lora)
        if not torch.allclose(states, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            raise UnsupportedError("their outputs differ from the fused operator's")
    assert layers is not None
    return layers


def _starts(config: PreTrainedConfig) -> list[int]:
    """The positions at which the compared tokens start: the first, and those just before what depends on a position."""
    named = thresholds(config.get_text_config())
    return [0, *(each.value - _PROBE_TOKENS // 2 for each in named if each.of_positions and each.value > _PROBE_TOKENS)]


@dataclass(frozen=True)
class _LayerModules:
    """The modules of a layer."""

    projections: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    norms: tuple[FusedRMSNorm, FusedRMSNorm]
    head_norms: tuple[FusedRMSNorm, FusedRMSNorm] | None
    loras: tuple[nn.Module | None, ...] = field(compare=False)
    """What peft has wrapped around each linear layer, in the order of `PROJECTIONS`."""

    @classmethod
    def of(cls, layer: nn.Module) -> _LayerModules:
        """Find them; raises `UnsupportedError` if there are others."""
        modules = dict(layer.named_modules())
        names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        found = [modules.get(name) for name in names]
        linear = [base_of(module) for module in found]
        loras = tuple(module if module is not base else None for module, base in zip(found, linear, strict=True))
        norms = [modules.get("input_layernorm"), modules.get("post_attention_layernorm")]
        head_norms = [modules.get("self_attn.q_norm"), modules.get("self_attn.k_norm")]
        known = {*linear, *norms, *head_norms, None}.union(*(lora.modules() for lora in loras if lora is not None))
        for name, base in zip(names, linear, strict=True):
            if type(base) not in (nn.Linear, PackedLinear):
                kind = "missing" if base is None else f"a {type(base).__module__}.{type(base).__qualname__}"
                raise UnsupportedError(f"their {name} is {kind}")
        for name, module in modules.items():
            if module not in known and next(module.parameters(recurse=False), None) is not None:
                raise UnsupportedError(f"they have other weights, such as an adapter's: {name}")
        query, key, value, out, gate, up, down = (m for m in linear if isinstance(m, nn.Linear))
        if len({m.bias is None for m in (query, key, value)}) > 1:
            raise UnsupportedError("only some of the query, key and value projections have biases")
        fused = [m for m in (*norms, *head_norms) if isinstance(m, FusedRMSNorm)]
        if len(fused) not in (2, 4) or any(
            m is not None and not isinstance(m, FusedRMSNorm) for m in (*norms, *head_norms)
        ):
            raise UnsupportedError("their norms are of another kind")
        first, second, *of_heads = fused
        return cls(
            (query, key, value),
            out,
            gate,
            up,
            down,
            (first, second),
            (of_heads[0], of_heads[1]) if of_heads else None,
            loras,
        )


class _Inside:
    """What is inside a model's layers at present.

    Args:
        model: The model without its head.
        parts: The modules of each layer when the model was tried.
    """

    adapted: Sequence[AdaptedProjection] = ()
    """The projections that peft has wrapped."""
    problem: str | None = None
    """Why the operator would compute something else."""

    def __init__(self, model: Any, parts: Sequence[_LayerModules]) -> None:
        inside = [*model.layers.modules(), model.norm]
        # The model's own children are included: an adapter may wrap its embedding alone.
        parents = [m for m in (model, *inside) if m._modules or isinstance(m, nn.ModuleDict)]
        self._children = [(module._modules, dict(module._modules)) for module in parents]
        self._hooks = [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        try:
            now = [_LayerModules.of(layer) for layer in model.layers]
        except UnsupportedError as reason:
            self.problem = str(reason)
            return
        if now != list(parts):
            self.problem = "their modules have been replaced"
        self.adapted = [
            AdaptedProjection(layer, projection, module)
            for layer, modules in enumerate(now)
            for projection, module in enumerate(modules.loras)
            if module is not None
        ]

    def has_changed(self) -> bool:
        """Whether a module has been added, removed or replaced since."""
        return any(now != before for now, before in self._children)

    def has_hooks(self) -> bool:
        """Whether a module has a hook, which the operator would not call."""
        return any(self._hooks)


class _DecoderLayers:
    """The layers of a model in the form that `decoder_stack` takes.

    Args:
        model: The model without its head.
        packed_weights: The packed weights of its linear layers.
        parts: The modules of each layer.
        calls: How each layer calls its attention.
    """

    def __init__(
        self,
        model: Any,
        packed_weights: PackedWeights,
        parts: Sequence[_LayerModules],
        calls: Sequence[_AttentionCall | None],
    ) -> None:
        self._embedding, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm
        self._packed_weights, self._parts = packed_weights, parts
        self._calls = [call for call in calls if call is not None]
        norms = [self._norm, *(norm for part in parts for norm in (*part.norms, *(part.head_norms or ())))]
        forms = {(norm.fused_eps, norm.fused_offset) for norm in norms if isinstance(norm, FusedRMSNorm)}
        if (
            not isinstance(self._norm, FusedRMSNorm)
            or len(forms) != 1
            or len({norm.weight.dtype for norm in norms}) != 1
        ):
            raise UnsupportedError("their norms differ from one another")
        if (
            len(self._calls) != len(parts)
            or len({(call.settings.scale, call.settings.softcap, call.pages.shape) for call in self._calls}) != 1
        ):
            raise UnsupportedError("their attention differs from layer to layer")
        if len({tuple(m.bias is None for m in (*p.projections, p.out, p.gate, p.up, p.down)) for p in parts}) != 1:
            raise UnsupportedError("their biases differ from layer to layer")
        if len({tuple(m.weight.shape for m in (*p.projections, p.out, p.gate, p.up, p.down)) for p in parts}) != 1:
            raise UnsupportedError("their sizes differ from layer to layer")
        head_dim = self._calls[0].pages.shape[-1]
        if any(norm.weight.shape != (head_dim,) for part in parts for norm in part.head_norms or ()):
            raise UnsupportedError("their norms of queries and keys are not per head")
        self._table = RotaryTable(self._rotary)
        self._dtype = self._norm.weight.dtype
        linear = tuple(m for p in parts for m in (*p.projections, p.out, p.gate, p.up, p.down))
        # Of norms in bfloat16, copies in float32 are kept.
        self._kept = linear if self._dtype == torch.float32 else (*linear, *norms)
        self._model, self._inside = model, _Inside(model, parts)
        self._name, self._announced = type(model).__name__, set[str]()

    def current_lora(self) -> DecoderLoRA | None:
        """Return the LoRAs that act in the pass that begins, or None.

        Raises:
            UnsupportedError: The model now has modules, hooks or weights that the operator would ignore.
        """
        model, weight = self._model, self._norm.weight
        if weight.dtype != self._dtype or weight.device.type != "cpu":
            raise UnsupportedError(f"its weights are {weight.dtype} on {weight.device}, not {self._dtype} on the CPU")
        if self._inside.has_changed():
            self._inside = _Inside(model, self._parts)
        if self._inside.problem is not None:
            raise UnsupportedError(self._inside.problem)
        if (model.embed_tokens, model.rotary_emb, model.norm) != (self._embedding, self._rotary, self._norm):
            raise UnsupportedError("its embedding or last norm has been replaced, as an adapter does")
        if self._inside.has_hooks():
            raise UnsupportedError("a module in them has a hook")
        return collect(self._inside.adapted)

    def announce(self, reason: UnsupportedError) -> None:
        """Log once why the layers do not run as one operation."""
        if str(reason) not in self._announced:
            self._announced.add(str(reason))
            logger.info(_SEPARATE, self._name, reason)

    def states(
        self,
        ids: Tensor | None,
        embedded: Tensor | None,
        positions: Tensor,
        attention: PagedAttention,
        lora: DecoderLoRA | None,
    ) -> Tensor:
        """Compute the last hidden states, (1, T, D), of token ids (1, T) or of their embeddings (1, T, D)."""
        hidden = self._embedding(ids) if embedded is None else embedded
        cos, sin = self._table(hidden, positions)
        weights = self._weights()
        states = decoder_stack(hidden[0], weights, cos, sin, attention.layers, attention.slots, attention.levels, lora)
        return states.unsqueeze(0)

    def _weights(self) -> DecoderWeights:
        """Return the current weights, packed again if they have changed."""
        cached: tuple[tuple[int, ...], DecoderWeights] | None = self._packed_weights.derived.get(self)
        version = weights_version(self._kept)
        if cached is None or cached[0] != version:
            of = self._packed_weights.panels
            packed = [x for p in self._parts for x in (of(*p.projections), of(p.out), of(p.gate), of(p.up), of(p.down))]
            layers = [
                DecoderLayer(
                    attention_norm=part.norms[0].weight.float(),
                    qkv=packed[5 * i].weight,
                    out=packed[5 * i + 1].weight,
                    mlp_norm=part.norms[1].weight.float(),
                    gate=packed[5 * i + 2].weight,
                    up=packed[5 * i + 3].weight,
                    down=packed[5 * i + 4].weight,
                    qkv_bias=packed[5 * i].bias,
                    query_norm=part.head_norms[0].weight.float() if part.head_norms else None,
                    key_norm=part.head_norms[1].weight.float() if part.head_norms else None,
                    out_bias=packed[5 * i + 1].bias,
                    gate_bias=packed[5 * i + 2].bias,
                    up_bias=packed[5 * i + 3].bias,
                    down_bias=packed[5 * i + 4].bias,
                    window=self._calls[i].settings.sliding_window,
                )
                for i, part in enumerate(self._parts)
            ]
            norm, settings = self._parts[0].norms[0], self._calls[0].settings
            weights = DecoderWeights(
                layers, self._norm.weight.float(), norm.fused_eps, norm.fused_offset, settings.scale, settings.softcap
            )
            cached = self._packed_weights.derived[self] = version, weights
        return cached[1]
