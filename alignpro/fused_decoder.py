"""All decoder layers of a model on a CPU in one call, for passes without gradients over a paged pool of keys and values.

`alignpro_kernels.decoder` computes layers like Llama's: RMS norms, rotary embeddings, a gated MLP with SiLU, and, if a
model has them, biases and norms of queries and keys. Whether a model's layers are of this kind is tested, not assumed:
both implementations compute the states of a few tokens. A model with other layers keeps its own forward pass, and so does
one whose layers have an adapter or hooks at the time of a pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from alignpro.cascade import Cascade
from alignpro.fused_layers import FusedNorm, become
from alignpro.packed_linear import PackedLinear, Packing, Panels
from alignpro_kernels import PagedKeys, cpp_library
from alignpro_kernels.decoder import DecoderLayer, DecoderWeights, decoder_stack

logger = logging.getLogger(__name__)

_TOKENS = 5  # on which both implementations are compared


class _FusedDecoder(nn.Module):
    """A transformers model without its head, whose layers may run as one call."""

    fused_layers: _Layers

    def forward(self, *args: Any, **options: Any) -> Any:
        """See the model's own forward pass, which also runs when the fused one does not apply."""
        plan = options.get("plan")
        if args or torch.is_grad_enabled() or not isinstance(plan, Cascade) or self.fused_layers.changed():
            return super().forward(*args, **options)
        states = self.fused_layers.states(
            options.get("input_ids"), options.get("inputs_embeds"), options["position_ids"], plan
        )
        return BaseModelOutputWithPast(last_hidden_state=states)


def attach(model: nn.Module, packing: Packing | None) -> None:
    """Run a model's layers as one call in the passes of generation, if they are of the supported kind.

    Args:
        model: The model without its head, after `fused_layers.attach`.
        packing: The packing of its linear layers; None leaves the model as it is.
    """
    if packing is None or isinstance(model, _FusedDecoder) or cpp_library.unavailable() is not None:
        return
    name = type(model).__name__
    try:
        layers = _try(model, packing)
    except _UnlikeError as reason:
        logger.info("layers of %s run as separate operations on the CPU: %s", name, reason)
        return
    become(model, _FusedDecoder)
    assert isinstance(model, _FusedDecoder)
    model.fused_layers = layers
    logger.info("layers of %s run as one operation in generation on the CPU", name)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        if isinstance(module, _FusedDecoder):
            module.__class__ = type(module).__mro__[2]
            del module.fused_layers


class _UnlikeError(Exception):
    """A model is not of the supported kind."""


@dataclass(frozen=True)
class _Call:
    """How a layer calls its attention."""

    pages: Tensor
    """(1, 2, page_size, kv_heads, head_dim): the keys and values that were written."""
    scale: float
    softcap: float | None
    window: int | None


class _Recorder:
    """Computes the attention of a few tokens to themselves and records how it is called."""

    def __init__(self, tokens: int) -> None:
        self.calls: dict[int, _Call] = {}
        self._tokens = tokens

    def cascade(self, pages: Sequence[Tensor]) -> Cascade:
        """Return the same attention over the given pages."""
        count = torch.tensor([self._tokens], dtype=torch.int32)
        positions = torch.arange(self._tokens, dtype=torch.int32)
        first = torch.zeros(1, dtype=torch.int32)
        level = PagedKeys(torch.cat([first, count]), first[None], count, positions, first)
        return Cascade(pages, positions.long(), [level])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """See `alignpro.attention.Plan.attend`; records the arguments of the call."""
        if key.shape != value.shape:
            raise _UnlikeError("its keys and values differ in shape")
        pages = torch.zeros(1, 2, self._tokens, key.shape[1], key.shape[3])
        scale = options["scaling"]
        self.calls[layer] = _Call(
            pages, key.shape[3] ** -0.5 if scale is None else scale, options["softcap"], options["sliding_window"]
        )
        return self.cascade([pages]).attend(0, query, key, value, **options)


@torch.no_grad()
def _try(model: Any, packing: Packing) -> _Layers:
    parts = [_Parts.of(layer) for layer in getattr(model, "layers", ())]
    ids, recorder = torch.arange(_TOKENS)[None], _Recorder(_TOKENS)
    if not parts or not all(hasattr(model, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        raise _UnlikeError("its modules have other names")
    expected = model(
        input_ids=ids,
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=ids,
        use_cache=False,
        plan=recorder,
    ).last_hidden_state
    calls = [recorder.calls.get(layer) for layer in range(len(parts))]
    layers = _Layers(model, packing, parts, calls)
    states = layers.states(ids, None, ids, recorder.cascade([call.pages.clone() for call in calls if call is not None]))
    if not torch.allclose(states, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        raise _UnlikeError("their outputs differ from the fused operator's")
    return layers


@dataclass(frozen=True)
class _Parts:
    """The modules of a layer."""

    projections: tuple[nn.Linear, nn.Linear, nn.Linear]
    out: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    norms: tuple[FusedNorm, FusedNorm]
    head_norms: tuple[FusedNorm, FusedNorm] | None

    @classmethod
    def of(cls, layer: nn.Module) -> _Parts:
        modules = dict(layer.named_modules())
        linear = [modules.get(f"self_attn.{name}_proj") for name in "qkvo"]
        linear += [modules.get(f"mlp.{name}_proj") for name in ("gate", "up", "down")]
        norms = [modules.get("input_layernorm"), modules.get("post_attention_layernorm")]
        head_norms = [modules.get("self_attn.q_norm"), modules.get("self_attn.k_norm")]
        known = {*linear, *norms, *head_norms, None}
        if any(next(m.parameters(recurse=False), None) is not None for m in modules.values() if m not in known):
            raise _UnlikeError("they have other weights, such as an adapter's")
        if any(type(m) not in (nn.Linear, PackedLinear) for m in linear):
            raise _UnlikeError("their linear layers have other names or types")
        query, key, value, out, gate, up, down = (m for m in linear if isinstance(m, nn.Linear))
        if (
            any(m.bias is not None for m in (out, gate, up, down))
            or len({m.bias is None for m in (query, key, value)}) > 1
        ):
            raise _UnlikeError("linear layers other than the query, key and value projections have biases")
        fused = [m for m in (*norms, *head_norms) if isinstance(m, FusedNorm)]
        if len(fused) not in (2, 4) or any(
            m is not None and not isinstance(m, FusedNorm) for m in (*norms, *head_norms)
        ):
            raise _UnlikeError("their norms are of another kind")
        return cls(
            (query, key, value), out, gate, up, down, (fused[0], fused[1]), (fused[2], fused[3]) if fused[2:] else None
        )


class _Layers:
    """The layers of a model in the form that `decoder_stack` takes.

    Args:
        model: The model without its head.
        packing: The packing of its linear layers.
        parts: The modules of each layer.
        calls: How each layer calls its attention.
    """

    def __init__(self, model: Any, packing: Packing, parts: Sequence[_Parts], calls: Sequence[_Call | None]) -> None:
        self._embedding, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, model.norm
        self._packing, self._parts, self._calls = packing, parts, [call for call in calls if call is not None]
        norms = [self._norm, *(norm for part in parts for norm in (*part.norms, *(part.head_norms or ())))]
        forms = {(norm.fused_eps, norm.fused_offset) for norm in norms if isinstance(norm, FusedNorm)}
        if (
            not isinstance(self._norm, FusedNorm)
            or len(forms) != 1
            or any(norm.weight.dtype != torch.float32 for norm in norms)
        ):
            raise _UnlikeError("their norms differ from one another")
        if (
            len(self._calls) != len(parts)
            or len({(call.scale, call.softcap, call.pages.shape) for call in self._calls}) != 1
        ):
            raise _UnlikeError("their attention differs from layer to layer")
        head_dim = self._calls[0].pages.shape[-1]
        if any(norm.weight.shape != (head_dim,) for part in parts for norm in part.head_norms or ()):
            raise _UnlikeError("their norms of queries and keys are not per head")
        inside = [*model.layers.modules(), self._norm]
        self._hooks = [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        # The model's own children are included: an adapter may wrap its embedding alone.
        self._children = [(m._modules, name, child) for m in (model, *inside) for name, child in m.named_children()]

    def changed(self) -> bool:
        """Whether a module now has an adapter or a hook, which the operator would ignore, or unsupported weights."""
        weight = self._norm.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            return True
        return any(self._hooks) or any(children.get(name) is not child for children, name, child in self._children)

    def states(self, ids: Tensor | None, embedded: Tensor | None, positions: Tensor, plan: Cascade) -> Tensor:
        """Compute the last hidden states, (1, T, D), of token ids (1, T) or of their embeddings (1, T, D)."""
        hidden = self._embedding(ids) if embedded is None else embedded
        cos, sin = self._rotary(hidden, positions)
        states = decoder_stack(hidden[0], self._current(), cos[0], sin[0], plan.layers, plan.slots, plan.levels)
        return states.unsqueeze(0)

    def _current(self) -> DecoderWeights:
        """Return the current weights, packed again if they have changed."""
        of = self._packing.panels
        packed = [x for p in self._parts for x in (of(*p.projections), of(p.out), of(p.gate), of(p.up), of(p.down))]
        known: tuple[list[Panels], DecoderWeights] | None = self._packing.derived.get(self)
        if known is None or any(a is not b for a, b in zip(packed, known[0], strict=True)):
            layers = [
                DecoderLayer(
                    attention_norm=part.norms[0].weight,
                    qkv=packed[5 * i].weight,
                    out=packed[5 * i + 1].weight,
                    mlp_norm=part.norms[1].weight,
                    gate=packed[5 * i + 2].weight,
                    up=packed[5 * i + 3].weight,
                    down=packed[5 * i + 4].weight,
                    qkv_bias=packed[5 * i].bias,
                    query_norm=part.head_norms[0].weight if part.head_norms else None,
                    key_norm=part.head_norms[1].weight if part.head_norms else None,
                    window=self._calls[i].window,
                )
                for i, part in enumerate(self._parts)
            ]
            form, call = self._parts[0].norms[0], self._calls[0]
            weights = DecoderWeights(
                layers, self._norm.weight, form.fused_eps, form.fused_offset, call.scale, call.softcap
            )
            known = self._packing.derived[self] = packed, weights
        return known[1]
