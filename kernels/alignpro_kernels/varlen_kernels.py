"""Attention over sequences of different lengths, one after the other in memory: the libraries whose kernels compute it.

Each library is a class with the same two functions, which call it with its own names and layouts: flash-attn 2 (Dao,
2023), 3 (Shah et al., 2024) and 4, and the FlashAttention-2 kernels inside PyTorch. All of them return the log-sum-exp of
the scores and have a backward pass from (out, lse), so that attention to several sets of keys can be merged and
differentiated (`alignpro_kernels.merged_attention`).

Which of them runs is decided by `timed_trial`: those that are not installed or do not support the input are left out by
`unavailable` and `unsupported`, the others are tried. A release that takes other arguments fails in its trial.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
"""Head dimensions are multiples of 8 up to this."""


@dataclass(frozen=True)
class Varlen:
    """S sequences of queries, each with a sequence of keys. The tensors are on the device of the queries."""

    cu_queries: Tensor
    """(S + 1,) int32, contiguous: sequence s has the queries cu_queries[s] to cu_queries[s + 1]."""
    cu_keys: Tensor
    """(S + 1,) int32, contiguous: likewise for the keys; its first S entries say where each sequence's keys begin."""
    max_queries: int
    """An upper bound of the number of queries of a sequence."""
    max_keys: int
    """An upper bound of the number of keys of a sequence."""
    causal: bool
    """Whether a query sees the keys up to its own; the last query of a sequence sees all of its keys."""
    key_lengths: Tensor | None = None
    """(S,) int32, contiguous: the number of keys of each sequence if that is not the distance of the entries of
    ``cu_keys``. Such a call has no backward pass."""


class VarlenKernels(Protocol):
    """A library of attention kernels. Nothing is imported from it before it is called."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def has_softcap(self) -> bool:
        """Whether scores can be capped."""

    def __hash__(self) -> int: ...

    def unavailable(self) -> str | None:
        """Return the reason why the library cannot run here, or None if it can."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention. No gradient flows through this function.

        Args:
            query: (T, H, D) bfloat16 or float16; D is contiguous.
            key: (U, H', D), H a multiple of H'.
            value: As ``key``.
            varlen: Which queries see which keys.
            scale: Scores are scale · q · k.
            softcap: Scores become softcap · tanh(score / softcap).
            window: With a causal mask, a query sees the last ``window`` keys up to its own.

        Returns:
            out (T, H, D); lse (T, H) float32, the natural logarithm of the sum of e^score. Both are undefined for a query
            without keys.
        """

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        varlen: Varlen,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of query, key and value from the gradient of the output.

        The kernels compute P = exp(score − lse), δ = Σ_d gradient · out and dS = P (dP − δ). So with the log-sum-exp and
        the output over more keys than those given here, the result is these keys' part of the gradient.

        Args:
            gradient: (T, H, D), of the output.
            query: As for `forward`; so are the arguments not named here.
            key: See there.
            value: See there.
            out: (T, H, D), the output over all keys.
            lse: (T, H) float32, the log-sum-exp over all keys.
            varlen: Which queries see which keys; without ``key_lengths``.
            scale: See `forward`.
            softcap: See `forward`.
            window: See `forward`.

        Returns:
            The gradients of query, key and value, in their shapes and dtypes.
        """


def unsupported(kernels: VarlenKernels, query: Tensor, softcap: float | None) -> str | None:
    """Return the reason why a library does not support queries (T, H, D), or None if it does."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, and the input is {query.dtype}"
    dim = query.shape[2]
    if dim % 8 or dim > MAX_HEAD_DIM:
        return f"it needs a head dimension that is a multiple of 8, at most {MAX_HEAD_DIM}, and this one is {dim}"
    if softcap is not None and not kernels.has_softcap:
        return "it has no soft-cap"
    return None


def _without_device(oldest: tuple[int, int], newest: tuple[int, int] | None = None) -> str | None:
    """Return the reason why there is no CUDA device of a compute capability in [oldest, newest), or None if there is."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < oldest or (newest is not None and capability >= newest):
        needs = f"{oldest[0]}.{oldest[1]}" + ("" if newest is None else f", below {newest[0]}.{newest[1]}")
        return f"the GPU has compute capability {capability[0]}.{capability[1]}: it needs {needs}"
    return None


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
        return _without_device((8, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            q=query,
            k=key,
            v=value,
            **_lengths(varlen),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=varlen.causal,
            **_sides(window, -1),
            softcap=softcap or 0.0,
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
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
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
            softmax_scale=scale,
            causal=varlen.causal,
            **_sides(window, -1),
            softcap=softcap or 0.0,
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
        return _without_device((9, 0), (10, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        from flash_attn_interface import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            **_lengths(varlen),
            seqused_k=varlen.key_lengths,
            softmax_scale=scale,
            causal=varlen.causal,
            window_size=tuple(_sides(window, -1).values()),
            softcap=softcap or 0.0,
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
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
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
            softmax_scale=scale,
            is_causal=varlen.causal,
            **_sides(window, -1),
            softcap=softcap or 0.0,
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
        return _without_device((9, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        from flash_attn.cute.interface import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            **_lengths(varlen),
            seqused_k=varlen.key_lengths,
            softmax_scale=scale,
            causal=varlen.causal,
            window_size=tuple(_sides(window, None).values()),
            softcap=softcap or 0.0,
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
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
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
            softmax_scale=scale,
            causal=varlen.causal,
            softcap=softcap or 0.0,
            **_sides(window, None),
            **_lengths(varlen),
            deterministic=_deterministic(),
        )
        return dq, dk, dv


class TorchFlash:
    """FlashAttention-2 inside PyTorch, which `torch.nn.attention.varlen` calls too.

    PyTorch has no public function that takes the log-sum-exp back in the backward pass, so its operators are called.
    """

    name = "torch"
    has_softcap = False

    def unavailable(self) -> str | None:
        """See `VarlenKernels.unavailable`."""
        if (reason := _without_device((8, 0))) is not None:
            return reason
        built = torch.backends.cuda.is_flash_attention_available()
        return None if built else "this PyTorch is built without FlashAttention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        varlen: Varlen,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenKernels.forward`."""
        assert softcap is None
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query=query,
            key=key,
            value=value,
            **_aten_lengths(varlen),
            dropout_p=0.0,
            is_causal=varlen.causal,
            return_debug_mask=False,
            scale=scale,
            **_sides(window, -1),
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
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VarlenKernels.backward`."""
        assert softcap is None
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
            scale=scale,
            **_sides(window, -1),
        )
        return dq, dk, dv


KERNELS: tuple[VarlenKernels, ...] = (Flash4(), Flash3(), Flash2(), TorchFlash())
"""All libraries, the newest kernels first."""


def available() -> list[VarlenKernels]:
    """The libraries that can run here, the newest kernels first."""
    return [kernels for kernels in KERNELS if why_unavailable(kernels) is None]


@functools.cache
def why_unavailable(kernels: VarlenKernels) -> str | None:
    """`VarlenKernels.unavailable`, found out once: it is asked in every layer."""
    return kernels.unavailable()


def _max_queries(varlen: Varlen) -> int:
    """The bound of the number of queries. FlashAttention-2 reads 1 as "every sequence has exactly one"."""
    return max(2, varlen.max_queries)


def _lengths(varlen: Varlen) -> dict[str, Any]:
    return {
        "cu_seqlens_q": varlen.cu_queries,
        "cu_seqlens_k": varlen.cu_keys,
        "max_seqlen_q": _max_queries(varlen),
        "max_seqlen_k": varlen.max_keys,
    }


def _aten_lengths(varlen: Varlen) -> dict[str, Any]:
    return {
        "cum_seq_q": varlen.cu_queries,
        "cum_seq_k": varlen.cu_keys,
        "max_q": _max_queries(varlen),
        "max_k": varlen.max_keys,
    }


def _sides(window: int | None, unlimited: int | None) -> dict[str, int | None]:
    """A window as the number of keys on either side of a query's own."""
    left, right = (unlimited, unlimited) if window is None else (window - 1, 0)
    return {"window_size_left": left, "window_size_right": right}
