"""How many operations a forward pass launches, counted on the unmodified transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignpro.models.attention_interface import AttentionSettings, install_attention
from benchmarks.models import make_model
from benchmarks.workload import ModelShape

_WITHOUT_KERNEL = ("aten::_unsafe_view", "aten::detach", "aten::alias", "aten::empty", "aten::new_empty")


def attention_operations(levels: int) -> int:
    """Kernels of paged attention in one layer: keys are written, each level is read in two, the results are merged."""
    return 1 + 2 * levels + (levels > 1)


def operations(shape: ModelShape) -> tuple[int, int]:
    """The operations of a layer without its attention, and of the rest of a pass without the head."""
    one, two = (_count(shape, layers) for layers in (1, 2))
    return two - one, 2 * one - two


class _Counter(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        self.count += not func.is_view and not func.name().startswith(_WITHOUT_KERNEL)
        return func(*args, **(kwargs or {}))


class _NoAttention:
    """An `AttentionBackend` that returns a tensor of the right shape."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """See `AttentionBackend.attend`."""
        out: Tensor = query.transpose(1, 2)
        return out


@torch.no_grad()
def _count(shape: ModelShape, layers: int) -> int:
    heads = shape.heads // shape.kv_heads
    tiny = ModelShape(layers, 16 * heads, 32, heads, 1, 32, shape.architecture, shape.tied)
    model = make_model(tiny, context=64, seed=0, dtype=torch.bfloat16)
    install_attention(model)
    run: Callable[..., Any] = model.base_model
    ids = torch.zeros(1, 8, dtype=torch.int64)
    options = {"position_ids": ids, "use_cache": False, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    with _Counter() as counter:
        run(input_ids=ids, attention_backend=_NoAttention(), **options)
    return counter.count
