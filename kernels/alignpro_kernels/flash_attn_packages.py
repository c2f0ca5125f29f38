"""flash-attn 2 (Dao, 2023), 3 (Shah et al., 2024) and 4: the calls of these packages.

Those that are not installed are left out by `unavailable`; a release that takes other arguments fails in its timed trial.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from alignpro_kernels.varlen import ScoreOptions, Varlen, without_device


class Flash2:
    """The package flash-attn: FlashAttention-2, ``flash_attn/flash_attn_interface.py``."""

    distribution = "flash-attn"
    has_softcap = True

    @property
    def name(self) -> str:
        """The package and its version."""
        return _with_version("flash-attn 2", self.distribution)

    def unavailable(self) -> str | None:
        """See `VarlenKernels.unavailable`."""
        if _installed(self.distribution) is None:
            return "the package flash-attn is not installed"
        return without_device((8, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q=query,
            k=key,
            v=value,
            **_lengths(varlen),
            dropout_p=0.0,
            softmax_scale=options.scale,
            causal=varlen.causal,
            **_sides(options, -1),
            softcap=options.softcap or 0.0,
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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = _like(query, key, value)
        _flash_attn_varlen_backward(
            dout=gradient,
            q=query,
            k=key,
            v=value,
            out=out,
            softmax_lse=lse.T.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            **_lengths(varlen),
            dropout_p=0.0,
            softmax_scale=options.scale,
            causal=varlen.causal,
            **_sides(options, -1),
            softcap=options.softcap or 0.0,
            alibi_slopes=None,
            deterministic=_deterministic(),
        )
        return dq, dk, dv


class Flash3:
    """FlashAttention-3 for Hopper, built from ``hopper/``: the module ``flash_attn_interface``."""

    distribution = "flash_attn_3"
    has_softcap = True

    @property
    def name(self) -> str:
        """The package and its version."""
        return _with_version("flash-attn 3", self.distribution)

    def unavailable(self) -> str | None:
        """See `VarlenKernels.unavailable`."""
        if _installed(self.distribution) is None:
            return "the package flash_attn_3 is not installed"
        return without_device((9, 0), (10, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        from flash_attn_interface import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            **_lengths(varlen),
            seqused_k=varlen.key_lengths,
            softmax_scale=options.scale,
            causal=varlen.causal,
            window_size=options.sides(-1),
            softcap=options.softcap or 0.0,
            num_splits=1,
            return_attn_probs=True,
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
        from flash_attn_interface import _flash_attn_backward

        dq, dk, dv = _like(query, key, value)
        _flash_attn_backward(
            dout=gradient,
            q=query,
            k=key,
            v=value,
            out=out,
            softmax_lse=lse.T.contiguous(),
            **_lengths(varlen),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=options.scale,
            is_causal=varlen.causal,
            **_sides(options, -1),
            softcap=options.softcap or 0.0,
            deterministic=_deterministic(),
        )
        return dq, dk, dv


class Flash4:
    """The package flash-attn-4: kernels for Hopper and Blackwell in CuTe DSL, compiled on first use."""

    distribution = "flash-attn-4"
    has_softcap = True

    @property
    def name(self) -> str:
        """The package and its version."""
        return _with_version("flash-attn 4", self.distribution)

    def unavailable(self) -> str | None:
        """See `VarlenKernels.unavailable`."""
        if _installed(self.distribution) is None:
            return "the package flash-attn-4 is not installed"
        return without_device((9, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        from flash_attn.cute.interface import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            **_lengths(varlen),
            seqused_k=varlen.key_lengths,
            softmax_scale=options.scale,
            causal=varlen.causal,
            window_size=options.sides(None),
            softcap=options.softcap or 0.0,
            num_splits=1,
            return_lse=True,
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
        from flash_attn.cute.interface import _flash_attn_bwd

        dq, dk, dv = _flash_attn_bwd(
            q=query,
            k=key,
            v=value,
            out=out,
            dout=gradient,
            lse=lse.T.contiguous(),
            softmax_scale=options.scale,
            causal=varlen.causal,
            softcap=options.softcap or 0.0,
            **_sides(options, None),
            **_lengths(varlen),
            deterministic=_deterministic(),
        )
        return dq, dk, dv


@functools.cache
def _installed(distribution: str) -> str | None:
    """Return the version of an installed package, or None.

    Its metadata is asked, since flash-attn 2 and 4 install into the same module ``flash_attn``.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _with_version(name: str, distribution: str) -> str:
    version = _installed(distribution)
    return name if version is None else f"{name} ({version})"


def _deterministic() -> bool:
    """Whether the backward pass must add in a fixed order; its kernels are faster if not."""
    return torch.are_deterministic_algorithms_enabled()


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors for the gradients of the given ones."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def _lengths(varlen: Varlen) -> dict[str, Any]:
    return {
        "cu_seqlens_q": varlen.cu_queries,
        "cu_seqlens_k": varlen.cu_keys,
        "max_seqlen_q": varlen.query_bound,
        "max_seqlen_k": varlen.max_keys,
    }


def _sides(options: ScoreOptions, unlimited: int | None) -> dict[str, int | None]:
    return dict(zip(("window_size_left", "window_size_right"), options.sides(unlimited), strict=True))
