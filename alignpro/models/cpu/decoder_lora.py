"""LoRAs of peft inside the fused decoder: which modules are LoRAs that it computes, and their factors in a pass.

The factors are read anew in each pass and never copied or packed, so a step of training needs no notification.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alignpro.models.invocation import ActiveTokens
from alignpro.models.peft_types import is_lora_linear, is_token_lora
from alignpro_kernels.decoder import DecoderLoRA, ProjectionLoRA


class UnsupportedError(Exception):
    """A model's layers, or what an adapter adds to them in a pass, are not of the kind that the fused decoder computes."""


@dataclass(frozen=True)
class AdaptedProjection:
    """A projection of a layer that peft has wrapped."""

    layer: int
    projection: int
    """Index into `alignpro_kernels.decoder.PROJECTIONS`."""
    module: Any
    """A LoRA layer of peft."""

    def loras(self) -> list[tuple[ProjectionLoRA, Tensor | bool]]:
        """Return the active LoRAs and the rows on which each acts: their indices (A,), or whether it acts on all.

        Raises:
            UnsupportedError: One of them does not compute W x + scale · B A x.
        """
        module = self.module
        if module.merged:
            raise UnsupportedError("an adapter is merged into their weights")
        if module.disable_adapters:
            return []
        return [self._lora(name) for name in module.active_adapters if name in module.lora_A]

    def _lora(self, name: str) -> tuple[ProjectionLoRA, Tensor | bool]:
        module = self.module
        down, up, variant = module.lora_A[name], module.lora_B[name], module.lora_variant.get(name)
        dropout = module.lora_dropout[name]
        if dropout.training and not isinstance(dropout, nn.Identity):
            raise UnsupportedError("a LoRA has dropout in training mode")
        if down.bias is not None or up.bias is not None:
            raise UnsupportedError("a LoRA has a bias")
        if variant is None:
            rows: Tensor | bool = True
        elif not is_token_lora(variant):
            raise UnsupportedError(f"a LoRA is of peft's kind {type(variant).__name__}")
        elif variant.active.rows is not None:
            rows = variant.active.rows
        elif variant.activated:
            raise UnsupportedError("peft chooses the tokens on which an activated LoRA acts")
        else:
            rows = True
        a, b = down.weight, up.weight
        if a.dtype != torch.float32 or b.dtype != torch.float32 or not a.is_cpu or not b.is_cpu:
            raise UnsupportedError(f"a LoRA is {a.dtype} on {a.device}, not float32 on the CPU")
        return ProjectionLoRA(self.layer, self.projection, a, b, float(module.scaling[name])), rows


def base_of(module: nn.Module | None) -> nn.Module | None:
    """Return the layer inside a LoRA layer of peft, or the module itself if it is none."""
    return module.base_layer if is_lora_linear(module) else module


def active_tokens(module: nn.Module) -> ActiveTokens | None:
    """Return what says on which tokens a LoRA layer acts, or None if it always acts on all."""
    variants = module.lora_variant.values() if is_lora_linear(module) else ()
    return next((variant.active for variant in variants if is_token_lora(variant)), None)


def collect(adapted: Sequence[AdaptedProjection]) -> DecoderLoRA | None:
    """Return the LoRAs that act in the pass that begins, with their current factors; None if none acts.

    Raises:
        UnsupportedError: An active adapter is not supported, or LoRAs act on different tokens.
    """
    found: list[ProjectionLoRA] = []
    acts_on: list[Tensor | bool] = []
    for projection in adapted:
        for lora, rows in projection.loras():
            if rows is False:
                continue
            if acts_on and rows is not acts_on[0]:
                raise UnsupportedError("LoRAs act on different tokens")
            acts_on.append(rows)
            found.append(lora)
    if not found:
        return None
    return DecoderLoRA(found, rows if isinstance(rows := acts_on[0], Tensor) else None)


@contextmanager
def everywhere(model: nn.Module) -> Iterator[None]:
    """Make LoRAs act on all tokens, without dropout, within the context."""
    modes = {module: module.training for module in model.modules()}
    shared = {active for module in modes if (active := active_tokens(module)) is not None}
    with ExitStack() as stack:
        for active in shared:
            stack.enter_context(active.set(True))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
