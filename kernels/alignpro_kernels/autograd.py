"""What the gradients written by hand have in common: they are not differentiated again, and autocast does not affect them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

REFERENCE = "linear_logprob with backend='reference'"
"""Whose gradients can be differentiated."""
Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(instead: str) -> Callable[[Backward], Backward]:
    """Decorate the backward pass of an autograd function whose gradients are constants: ``create_graph=True`` is an error.

    PyTorch's `once_differentiable` raises only where a gradient that arrives requires one, and where all gradients are
    asked for: a penalty on the gradient of a loss may contribute nothing.

    Args:
        instead: What can be differentiated twice, for the message.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "create_graph=True, but a gradient that was computed by hand cannot be differentiated again: "
                    f"leave it out, or for second derivatives use {instead}"
                )
            return backward(ctx, *gradients)

        return once

    return decorate


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast; does nothing if it is already off, which saves time for small heads."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def loss_with_gradients(loss: Tensor, gradients: Sequence[Tensor | None], variables: Sequence[Tensor | None]) -> Tensor:
    """Return a loss () whose backward pass gives the variables these gradients, scaled, which it may do in place."""
    attached: Tensor = _PrecomputedGradient.apply(loss, gradients, *variables)
    return attached


class _PrecomputedGradient(torch.autograd.Function):
    """See `loss_with_gradients`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *variables: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @differentiable_once(REFERENCE)
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # Without retain_graph the saved gradients are not needed again, so they are scaled in place and returned.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        # On a GPU, reading the scale would synchronise with the device; multiplying costs one pass over the gradient.
        if scale.device.type == "cpu" and scale.item() == 1.0:
            return None, None, *ctx.saved_tensors
        return (
            None,
            None,
            *(None if g is None else (scale * g).to(g.dtype) if retained else g.mul_(scale) for g in ctx.saved_tensors),
        )


class _LoRARows(torch.autograd.Function):
    """See `lora_rows`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, a)
        ctx.scale = scale
        return scale * (hidden.to(dtype) @ a.to(dtype).T)

    @staticmethod
    @differentiable_once(REFERENCE)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, a = ctx.saved_tensors
        of_hidden, of_a, *_ = ctx.needs_input_grad
        with without_autocast(hidden.device.type):
            gradient = ctx.scale * gradients[0]
            d_hidden = gradient @ a.to(gradient.dtype) if of_hidden else None
            return d_hidden, gradient.T @ hidden.to(gradient.dtype) if of_a else None, None, None


def lora_rows(hidden: Tensor, a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Compute scale · h Aᵀ of a LoRA, (N, r) in ``dtype``, differentiable; the gradients are rounded once, at the end.

    Args:
        hidden: (N, D).
        a: (r, D), in the dtype of ``hidden``.
        scale: That of the LoRA.
        dtype: In which to compute.
    """
    rows: Tensor = _LoRARows.apply(hidden, a, scale, dtype)
    return rows
