"""Selection of the backend that runs an operator.

``triton``     GPUs (CUDA and ROCm): Triton kernels around the vendor's matrix products.
``cpp``        CPUs: csrc/, built on first use.
``torch``      Any device: plain PyTorch, in chunks.
``reference``  Any device: the specification, which materialises all logits. Used only if requested by name.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from alignpro_kernels import triton_support

logger = logging.getLogger("alignpro_kernels")

BACKENDS = ("triton", "cpp", "torch", "reference")


class BackendError(RuntimeError):
    """Raised when a backend was requested by name and cannot run; the message says why."""


def backends() -> dict[str, str | None]:
    """Return every backend by name, with None if it can run here, otherwise the reason why it cannot.

    The first call may build the C++ library, which takes a minute; the build is cached.
    """
    return {name: unavailable(name) for name in BACKENDS}


def choose_backend(operator: str, backend: str, like: Tensor) -> str:
    """Return the requested backend, or for ``auto`` the best one for the input; each choice is logged once.

    Raises:
        BackendError: The backend is unknown, cannot run here, or does not support the input.
    """
    if backend == "auto":
        best = "triton" if like.is_cuda else "cpp"
        reason = _unsupported(best, like) or unavailable(best)
        if reason is not None:
            _log_fallback(operator, best, reason)
        chosen = best if reason is None else "torch"
    elif backend not in BACKENDS:
        raise BackendError(f"{operator}: there is no backend {backend!r}: use 'auto' or one of {', '.join(BACKENDS)}")
    else:
        chosen = backend
        if (reason := unavailable(chosen) or _unsupported(chosen, like)) is not None:
            raise BackendError(f"{operator}: backend {backend!r} cannot run here: {reason}")
    _log_choice(operator, chosen)
    return chosen


@functools.cache
def backend_module(name: str) -> ModuleType:
    """Return the module of a fast backend; see `alignpro_kernels.head` for its functions."""
    return importlib.import_module(f"alignpro_kernels.{name}_head")


def merges_with_triton(like: Tensor) -> bool:
    """Whether Triton merges attention states on the device of ``like``; otherwise plain PyTorch does."""
    return like.is_cuda and unavailable("triton") is None


def unavailable(name: str) -> str | None:
    """Return the reason why a backend cannot run here, or None if it can."""
    if name == "triton":
        return triton_support.unavailable()
    if name == "cpp":
        from alignpro_kernels import cpp_library  # imported lazily: torch.utils.cpp_extension is slow to import

        return cpp_library.unavailable()
    return None


def _unsupported(name: str, like: Tensor) -> str | None:
    """Return the reason why a backend does not support the input, or None if it does."""
    if name in ("torch", "reference"):
        return None
    if like.dtype == torch.float64:
        return "it computes in float32: use 'torch' or 'reference' for float64 inputs"
    if name == "cpp" and like.device.type != "cpu":
        return f"it runs on the CPU, and the input is on {like.device}"
    if name == "triton" and not triton_support.supports(like.device):
        return f"it runs on a GPU, and the input is on {like.device}"
    return None


@functools.cache
def _log_choice(operator: str, backend: str) -> None:
    logger.info("%s runs on backend %s", operator, backend)


@functools.cache
def _log_fallback(operator: str, backend: str, reason: str) -> None:
    logger.info("%s does not run on backend %s: %s", operator, backend, reason)
