"""The memory of the pages: reallocated as it grows, or mapped page by page into a fixed range of addresses.

| owns | does not own |
|---|---|
| the bytes of the pages, how many of them have memory | what a page holds, who holds it |
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from alignpro.engine.virtual_memory import CudaMemory, MemoryMapError, OutOfMappedMemoryError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
"""Memory is mapped in pieces of this size, rounded to the device's granularity (2 MiB on NVIDIA GPUs)."""


class Arena(Protocol):
    """Pages of equal size, the first `backed` of which have memory."""

    @property
    def pages(self) -> Tensor:
        """(n, page_bytes) uint8, n ≥ `backed`."""

    @property
    def backed(self) -> int:
        """Number of pages that have memory."""

    @property
    def num_moves(self) -> int:
        """How often the pages have got another address, at which their contents are copies."""

    def resize(self, count: int, total: int) -> None:
        """Have memory for the first ``count`` pages of at most ``total``; the contents of those that had some are kept.

        Raises:
            RuntimeError, MemoryError: The device has too little memory; nothing has changed.
        """


class MovingArena:
    """A tensor that is reallocated: graphs that were captured with its address are out of date then.

    Args:
        page_bytes: Size of a page.
        device: Where the pages are.
    """

    def __init__(self, page_bytes: int, device: torch.device) -> None:
        self.pages = torch.empty(0, page_bytes, dtype=torch.uint8, device=device)
        self.num_moves = 0

    @property
    def backed(self) -> int:
        """See `Arena.backed`."""
        return len(self.pages)

    def resize(self, count: int, total: int) -> None:
        """See `Arena.resize`."""
        kept = min(count, self.backed)
        pages = torch.empty(count, self.pages.shape[1], dtype=torch.uint8, device=self.pages.device)
        pages[:kept] = self.pages[:kept]
        shrunk, self.pages = count < self.backed, pages
        self.num_moves += 1
        if shrunk and pages.is_cuda:
            torch.cuda.empty_cache()  # else the first allocation of an optimizer may split the segment that became free


class FixedArena:
    """Pages at addresses that never change: memory is mapped to them and taken away again (CUDA's virtual memory).

    So growing copies nothing, and graphs outlive the memory's release for a training step. The addresses are reserved at
    the first `resize`.

    Args:
        page_bytes: Size of a page.
        memory: Maps the memory.
    """

    def __init__(self, page_bytes: int, memory: DeviceMemory) -> None:
        self._page_bytes, self._memory = page_bytes, memory
        self._changing = False
        self.num_moves = 0
        self._chunk = -(-CHUNK_BYTES // memory.granularity) * memory.granularity
        self._address = 0
        self._reserved = 0  # bytes
        self._chunks: list[int] = []  # handles of the memory of the leading chunks
        self.backed = 0
        self.pages = torch.empty(0, page_bytes, dtype=torch.uint8, device=memory.device)

    def resize(self, count: int, total: int) -> None:
        """See `Arena.resize`."""
        if self._changing:  # an interrupt has left it so
            self._begin_anew()
        self._changing = True
        try:
            self._map(count, total)
        except MemoryMapError:
            self._changing = False
            raise
        self.backed = count
        self._changing = False

    def _map(self, count: int, total: int) -> None:
        wanted, before = -(-count * self._page_bytes // self._chunk), len(self._chunks)
        if count > 0 and not self._address:
            size = min(total * self._page_bytes, self._memory.capacity)
            self._reserved = -(-size // self._chunk) * self._chunk
            self._address = self._memory.reserve(self._reserved)
        if wanted * self._chunk > self._reserved:
            raise OutOfMappedMemoryError(f"{count} pages are more than {self._reserved} bytes")
        try:
            while len(self._chunks) < wanted:
                self._chunks.append(self._memory.map(self._address + len(self._chunks) * self._chunk, self._chunk))
        except MemoryMapError:
            self._shrink(before)
            raise
        if wanted < before:
            self._memory.synchronize()  # a pass may still read what is taken away
            self._shrink(wanted)
        if not len(self.pages) and self._chunks:  # a tensor can be made of mapped memory only
            self.pages = self._memory.tensor(self._address, self._reserved // self._page_bytes, self._page_bytes)

    def _shrink(self, chunks: int) -> None:
        while len(self._chunks) > chunks:
            address = self._address + (len(self._chunks) - 1) * self._chunk
            self._memory.unmap(address, self._chunk, self._chunks[-1])
            self._chunks.pop()

    def _begin_anew(self) -> None:
        """Give up all memory and addresses, of which a piece is lost if an interrupt came before its handle was known."""
        self.num_moves += 1
        self.pages, self.backed = self.pages[:0].clone(), 0
        with suppress(MemoryMapError):
            self._shrink(0)
            if self._address:
                self._memory.free(self._address, self._reserved)
        self._address, self._chunks, self._changing = 0, [], False

    def __del__(self) -> None:
        with suppress(Exception):  # when the interpreter exits, the driver may be gone already
            self._begin_anew()


class DeviceMemory(Protocol):
    """Reserves addresses of a device and maps memory to them."""

    device: torch.device
    granularity: int
    """Sizes and addresses of mapped memory are multiples of this many bytes."""
    capacity: int
    """Memory of the device in bytes."""

    def reserve(self, size: int) -> int:
        """Reserve a range of addresses that have no memory; returns the first."""

    def map(self, address: int, size: int) -> int:
        """Map new memory to a range of reserved addresses; returns its handle.

        Raises:
            MemoryMapError: The device has too little memory.
        """

    def unmap(self, address: int, size: int, handle: int) -> None:
        """Take the memory away from a range of addresses and free it."""

    def free(self, address: int, size: int) -> None:
        """Give a range of addresses back."""

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""

    def tensor(self, address: int, rows: int, columns: int) -> Tensor:
        """(rows, columns) uint8 at an address, whose beginning has memory."""


def new_arena(page_bytes: int, device: torch.device) -> Arena:
    """The arena of a device: fixed on NVIDIA GPUs whose driver maps virtual memory, else moving."""
    if device.type == "cuda" and torch.version.cuda:
        try:
            return FixedArena(page_bytes, CudaMemory(device))
        except (OSError, MemoryMapError) as error:
            logger.warning("%s: the pages of the engine move as their number grows: %s", device, error)
    return MovingArena(page_bytes, device)
