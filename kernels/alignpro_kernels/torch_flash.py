"""The FlashAttention-2 kernels inside PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alignpro_kernels.varlen import ScoreOptions, Varlen, without_device


class TorchFlash:
    """FlashAttention-2 inside PyTorch, which `torch.nn.attention.varlen` calls too.

    PyTorch has no public function that takes the log-sum-exp back in the backward pass, so its operators are called.
    """

    name = "torch"
    has_softcap = False

    def unavailable(self) -> str | None:
        """See `VarlenKernels.unavailable`."""
        if (reason := without_device((8, 0))) is not None:
            return reason
        built = torch.backends.cuda.is_flash_attention_available()
        return None if built else "this PyTorch is built without FlashAttention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        assert options.softcap is None
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query=query,
            key=key,
            value=value,
            **_aten_lengths(varlen),
            dropout_p=0.0,
            is_causal=varlen.causal,
            return_debug_mask=False,
            scale=options.scale,
            **_sides(options),
            seqused_k=varlen.key_lengths,
        )
        return out, lse.T  # (H, T) → (T, H)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VarlenKernels.backward`."""
        assert options.softcap is None
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad_out=gradient,
            query=query,
            key=key,
            value=value,
            out=out,
            logsumexp=lse.T.contiguous(),
            **_aten_lengths(varlen),
            dropout_p=0.0,
            is_causal=varlen.causal,
            rng_state=torch.zeros(2, dtype=torch.uint64, device=query.device),  # read with dropout only
            unused=torch.empty(0, device=query.device),
            scale=options.scale,
            **_sides(options),
        )
        return dq, dk, dv


def _aten_lengths(varlen: Varlen) -> dict[str, Any]:
    return {
        "cum_seq_q": varlen.cu_queries,
        "cum_seq_k": varlen.cu_keys,
        "max_q": varlen.query_bound,
        "max_k": varlen.max_keys,
    }


def _sides(options: ScoreOptions) -> dict[str, int | None]:
    return dict(zip(("window_size_left", "window_size_right"), options.sides(-1), strict=True))
