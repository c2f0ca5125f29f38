"""A paged pool of keys and values: write and read tokens, copy pages.

A pool is one arena of bytes, (n_pages, page_bytes) uint8, from which models of different geometry allocate pages. A page
holds ``page_size`` tokens of one model, for all its layers: each layer has a fixed range of the page's bytes, which holds
(2, page_size, kv_heads, head_dim), keys before values. A layer of a model is therefore a strided view of the arena,

    pages (n_pages, 2, page_size, kv_heads, head_dim)

whose stride over pages is page_bytes / itemsize and whose inner dimensions are contiguous. The view spans all pages, of which
the model reads and writes its own. A token is stored in slot ``page * page_size + offset``.

On a CUDA device, kernels of csrc/cuda write the pages. They copy bits and so support any dtype, never synchronise, and can be
captured in a CUDA graph after one call outside of it (the first call may build the library). On a CPU, csrc/cpu writes keys
and values. On other devices, or if a library cannot be built, plain PyTorch does the same; it synchronises only in
`copy_pages`. The logger ``alignpro_kernels`` reports which is used.

No gradient flows through a pool.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("alignpro_kernels")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def write_kv(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Write the keys and values of T tokens into their slots, in place.

    Args:
        keys: (T, kv_heads, head_dim), the dtype of ``pages``; each token must be contiguous, the token stride is arbitrary.
        values: Likewise.
        pages: (n_pages, 2, page_size, kv_heads, head_dim), a layer's view of the arena.
        slots: (T,) int64; −1 skips the token, e.g. the padding of a captured CUDA graph. Slots must not repeat: which
            token would be kept is undefined.

    Raises:
        ValueError, TypeError: An argument has the wrong shape, layout, device or dtype, or, on the CPU, a slot lies
            outside the pool; the message names it. On a GPU values are not checked: tokens with such slots are skipped.
    """
    _check_pages(pages)
    _check_index("slots", slots, pages)
    _check_states("keys", keys, pages, slots)
    _check_states("values", values, pages, slots)
    if _has_kernels(pages.device.type):
        write = torch.ops.alignpro.write_kv_cpu if pages.device.type == "cpu" else torch.ops.alignpro.write_kv
        write(keys, values, pages, slots)
        return
    capacity = pages.shape[0] * pages.shape[2]
    _check_range("slots", slots, -1, capacity)
    valid = _in_range(slots, capacity)
    if pages.device.type != "cpu":
        _write_without_sync(keys, values, pages, slots, valid)
        return
    if not bool(valid.all()):
        keys, values, slots = keys[valid], values[valid], slots[valid]
    page, offset = slots // pages.shape[2], slots % pages.shape[2]
    bits = _bits(pages)
    bits[page, 0, offset] = _bits(keys)
    bits[page, 1, offset] = _bits(values)


def _write_without_sync(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor, valid: Tensor) -> None:
    """`write_kv` for the tokens in ``valid``, (T,) bool, without synchronising with the device.

    A skipped token repeats the write of the first token kept; if there is none, it rewrites the present content.
    """
    if not len(slots):
        return
    token = torch.where(valid, torch.arange(len(slots), device=slots.device), valid.int().argmax())  # (T,)
    at = slots.index_select(0, token).clamp(0, pages.shape[0] * pages.shape[2] - 1)
    page, offset = at // pages.shape[2], at % pages.shape[2]
    bits = _bits(pages)
    for which, states in enumerate((keys, values)):
        written = _bits(states).index_select(0, token)
        bits[page, which, offset] = torch.where(valid.any(), written, bits[page, which, offset])


@torch.no_grad()
def read_kv(pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of the keys and values in T slots; plain PyTorch, for tests and attention without paging.

    Args:
        pages: (n_pages, 2, page_size, kv_heads, head_dim), a layer's view of the arena.
        slots: (T,) int64; −1 reads zeros.

    Returns:
        keys, values: (T, kv_heads, head_dim) in the dtype of ``pages``.

    Raises:
        ValueError, TypeError: As for `write_kv`. On a GPU slots outside the pool read zeros.
    """
    _check_pages(pages)
    _check_index("slots", slots, pages)
    capacity = pages.shape[0] * pages.shape[2]
    _check_range("slots", slots, -1, capacity)
    at = slots.clamp(0, capacity - 1)
    states = _bits(pages)[at // pages.shape[2], :, at % pages.shape[2]]  # (T, 2, kv_heads, head_dim)
    states.masked_fill_(~_in_range(slots, capacity)[:, None, None, None], 0)
    keys, values = states.view(pages.dtype).unbind(1)
    return keys, values


@torch.no_grad()
def copy_pages(arena: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy whole pages over others, in place, e.g. for a sequence that forks from another one.

    Args:
        arena: (n_pages, page_bytes) uint8, contiguous.
        source: (n,) int64 page numbers; may contain a page several times.
        destination: (n,) int64 page numbers, all different and none of them a source: the order of copies is undefined.

    Raises:
        ValueError, TypeError: An argument has the wrong shape, layout, device or dtype, or, on the CPU, a page number
            lies outside the arena or sources and destinations overlap; the message names it. On a GPU values are not
            checked: pairs with a number outside the arena are skipped.
    """
    if arena.dtype != torch.uint8:
        raise TypeError(f"arena is {arena.dtype}: expected {torch.uint8}")
    if arena.ndim != 2 or not arena.numel() or not arena.is_contiguous():
        raise ValueError(
            f"arena has shape {tuple(arena.shape)} and strides {arena.stride()}: expected (n_pages, page_bytes), contiguous"
        )
    _check_index("source", source, arena)
    _check_index("destination", destination, arena)
    if source.shape != destination.shape:
        raise ValueError(f"source has {len(source)} pages, destination {len(destination)}: the numbers must be equal")
    _check_range("source", source, 0, len(arena))
    _check_range("destination", destination, 0, len(arena))
    if arena.device.type == "cpu":
        if bool((overlap := torch.isin(destination, source)).any()):
            raise ValueError(f"destination: page {int(destination[overlap][0])} is also a source")
        arena.index_copy_(0, destination, arena.index_select(0, source))  # all numbers have been checked
        return
    if _has_kernels(arena.device.type):
        torch.ops.alignpro.copy_pages(arena, source, destination)
        return
    valid = _in_range(source, len(arena)) & _in_range(destination, len(arena))
    arena.index_copy_(0, destination[valid], arena.index_select(0, source[valid]))


@functools.cache
def _has_kernels(device: str) -> bool:
    """Load the kernels of csrc for a device type; return whether they can be used, which is logged once."""
    reason = _unavailable(device)
    kernels = "C++" if device == "cpu" else "CUDA kernels"
    logger.info("pages are written by %s", kernels if reason is None else f"PyTorch: {reason}")
    return reason is None


def _unavailable(device: str) -> str | None:
    """Return the reason why the kernels cannot run, or None if they can; builds the library if necessary."""
    if device == "cpu":
        from alignpro_kernels import cpp_library  # imported lazily: torch.utils.cpp_extension is slow to import

        return cpp_library.unavailable()
    if device != "cuda":
        return f"the kernels run on a GPU, and the pages are on the {device}"
    if torch.version.cuda is None:
        return "the kernels need CUDA, and this PyTorch is built without it"
    from alignpro_kernels.build import BuildError

    try:
        load_kernels()
    except (BuildError, OSError) as error:
        return str(error)
    return None


@functools.cache
def load_kernels() -> None:
    """Load the operators ``alignpro::write_kv`` and ``alignpro::copy_pages``, building them first if necessary.

    Raises:
        BuildError, OSError: They cannot be built or loaded.
    """
    from alignpro_kernels.build import cuda_library  # imported lazily: torch.utils.cpp_extension is slow to import

    torch.ops.load_library(str(cuda_library()))

    @torch.library.register_fake("alignpro::write_kv")
    def _(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
        return None

    @torch.library.register_fake("alignpro::copy_pages")
    def _(arena: Tensor, source: Tensor, destination: Tensor) -> None:
        return None


def _bits(x: Tensor) -> Tensor:
    """View the memory as integers, so that indexing supports every dtype and preserves every bit."""
    return x.view(_BITS[x.element_size()])


def _in_range(index: Tensor, bound: int) -> Tensor:
    return (index >= 0) & (index < bound)


def _check_pages(pages: Tensor) -> None:
    if pages.element_size() not in _BITS:
        raise TypeError(f"pages is {pages.dtype}: expected a dtype of 1, 2, 4 or 8 bytes")
    if pages.ndim != 5 or pages.shape[1] != 2 or not pages.numel():
        raise ValueError(
            f"pages has shape {tuple(pages.shape)}: expected (n_pages, 2, page_size, kv_heads, head_dim), not empty"
        )
    if not pages[:1].is_contiguous() or (len(pages) > 1 and pages.stride(0) < pages[0].numel()):
        raise ValueError(
            f"pages has strides {pages.stride()} for shape {tuple(pages.shape)}: within a page it must be contiguous, and "
            "pages must not overlap"
        )


def _check_states(name: str, states: Tensor, pages: Tensor, slots: Tensor) -> None:
    if states.dtype != pages.dtype:
        raise TypeError(f"{name} is {states.dtype} and pages is {pages.dtype}: they must agree")
    if states.shape != (len(slots), *pages.shape[3:]):
        raise ValueError(f"{name} has shape {tuple(states.shape)}: expected {(len(slots), *pages.shape[3:])}")
    if states.device != pages.device:
        raise ValueError(f"{name} is on {states.device} and pages is on {pages.device}: they must agree")
    if not states[:1].is_contiguous():
        raise ValueError(
            f"{name} has strides {states.stride()} for shape {tuple(states.shape)}: a token's row must be contiguous"
        )


def _check_index(name: str, index: Tensor, like: Tensor) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name} is {index.dtype}: expected {torch.int64}")
    if index.ndim != 1 or not index.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(index.shape)} and strides {index.stride()}: expected one dimension, contiguous"
        )
    if index.device != like.device:
        raise ValueError(f"{name} is on {index.device} and the pages are on {like.device}: they must agree")


def _check_range(name: str, index: Tensor, lowest: int, bound: int) -> None:
    """Check on the CPU that every index is in [lowest, bound); on other devices that would synchronise."""
    if index.device.type != "cpu":
        return
    outside = (index < lowest) | (index >= bound)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise ValueError(f"{name}: number {place} is {int(index[place])}, outside of {lowest} to {bound - 1}")
