"""Pages whose memory is mapped into a fixed range of addresses: the engine's graphs outlive the memory's release."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
from pathlib import Path

import pytest
import torch
from checks import assert_same_groups
from tiny_models import ragged
from torch import Tensor
from tracing import Tracer, traced

from alignpro.engine import Engine, SamplingParams, virtual_memory, worker
from alignpro.engine import arena as arena_module
from alignpro.engine.arena import CHUNK_BYTES, FixedArena, MovingArena
from alignpro.engine.pool import Geometry, KVPool
from alignpro.engine.virtual_memory import (
    AccessDescription,
    AllocationProperties,
    MemoryMapError,
    OutOfMappedMemoryError,
)
from alignpro.models.language_model import LanguageModel

PROMPTS = ragged(5, 100, shortest=5, longest=40, seed=3)
PARAMS = SamplingParams(max_tokens=20, n=3, stop_token_ids=(0, 1, 2, 3))
_PROT_NONE, _PROT_READ_WRITE, _MADV_DONTNEED = 0, 3, 4


class HostMemory:
    """A `DeviceMemory` of the host: its pages cannot be touched before they are mapped, nor after they are unmapped."""

    device = torch.device("cpu")
    granularity = 1 << 16
    capacity = 1 << 40

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.mapped, self.calls = limit, 0, list[str]()
        self._c = ctypes.CDLL(None, use_errno=True)
        self._c.mmap.restype = ctypes.c_void_p
        self._c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for name in ("mprotect", "madvise"):
            getattr(self._c, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def reserve(self, size: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        address = self._c.mmap(None, size, _PROT_NONE, flags, -1, 0)
        assert address and address != ctypes.c_void_p(-1).value
        self.calls.append("reserve")
        return int(address)

    def map(self, address: int, size: int) -> int:
        if self.mapped + size > self.limit:
            raise OutOfMappedMemoryError("cuMemCreate: out of memory")
        assert self._c.mprotect(address, size, _PROT_READ_WRITE) == 0
        self.mapped += size
        return address

    def unmap(self, address: int, size: int, handle: int) -> None:
        assert handle == address
        assert self._c.madvise(address, size, _MADV_DONTNEED) == 0
        assert self._c.mprotect(address, size, _PROT_NONE) == 0
        self.mapped -= size

    def free(self, address: int, size: int) -> None:
        assert self._c.munmap(address, size) == 0
        self.calls.append("free")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def tensor(self, address: int, rows: int, columns: int) -> Tensor:
        buffer = (ctypes.c_uint8 * (rows * columns)).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(rows, columns)


def test_pages_keep_their_address_and_contents_as_memory_comes_and_goes() -> None:
    memory, page = HostMemory(), 1 << 20
    arena = FixedArena(page, memory)
    assert arena.backed == 0 and not memory.calls
    arena.resize(10, 1000)
    address = arena.pages.data_ptr()
    arena.pages[:10] = torch.arange(10, dtype=torch.uint8)[:, None]
    arena.resize(200, 1000)
    arena.pages[199] = 7
    assert arena.backed == 200 and memory.mapped == -(-200 * page // CHUNK_BYTES) * CHUNK_BYTES
    arena.resize(3, 1000)
    assert memory.mapped == CHUNK_BYTES and memory.calls[-1] == "synchronize"
    assert arena.pages[:3, 0].tolist() == [0, 1, 2]
    arena.resize(0, 1000)
    assert memory.mapped == 0 and arena.backed == 0
    arena.resize(200, 1000)
    assert arena.pages.data_ptr() == address and arena.num_moves == 0
    assert int(arena.pages[199].sum()) == 0  # new memory: nothing of the old one is there
    assert memory.calls.count("reserve") == 1
    del arena
    assert memory.mapped == 0 and memory.calls[-1] == "free"


def test_without_memory_nothing_changes() -> None:
    memory, page = HostMemory(limit=2 * CHUNK_BYTES), 1 << 20
    pool = KVPool(
        {"m": Geometry(((1, 1),), torch.float16)},
        memory.device,
        page_tokens=page // 4,
        total=1000,
        arena=lambda size, _: FixedArena(size, memory),
    )
    assert pool.page_bytes == page and pool.reserve(5)
    assert not pool.reserve(300)  # neither twice as many, nor just these
    assert memory.mapped <= memory.limit and pool.total == pool.arena_bytes // page
    pages = pool.allocate("m", pool.total)
    pool.layers("m")[0][pages] = 1.0
    with pytest.raises(MemoryMapError, match="out of memory"):
        FixedArena(page, HostMemory(limit=0)).resize(1, 10)
    arena = FixedArena(page, HostMemory())
    arena.resize(1, 1 << 40)  # a pool larger than the device
    assert arena.pages.nbytes <= HostMemory.capacity + CHUNK_BYTES
    with pytest.raises(MemoryError, match="1048577 pages"):
        arena.resize(1 + (HostMemory.capacity >> 20), 1 << 40)


def test_an_interrupt_at_any_instruction_leaves_an_arena_that_can_be_resized() -> None:
    """As the engine does after an interrupt, which forgets what the pages hold."""
    page, sizes = 1 << 20, (3, 200, 0, 130)
    tracer = Tracer((arena_module,))
    with traced(tracer):
        whole = FixedArena(page, HostMemory())
        for size in sizes:
            whole.resize(size, 256)
    places = [place for place in tracer.seen if place[0].co_name in ("resize", "_map", "_shrink")]
    assert len(places) > 150
    for place in places[::4]:
        arena = FixedArena(page, HostMemory())
        with pytest.raises(KeyboardInterrupt), traced(Tracer((arena_module,), KeyboardInterrupt, place)):
            for size in sizes:
                arena.resize(size, 256)
        for size in (130, 10, 200):
            arena.resize(size, 256)
            arena.pages[:size, 0] = 1
            assert arena.backed == size


@pytest.mark.parametrize("fixed", [True, False])
def test_graphs_outlive_release_where_the_pages_stay(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    """After a release for a training step, the same plans serve, and what was cached is where it was said to be."""
    memory = HostMemory()

    def new_arena(page_bytes: int, device: torch.device) -> FixedArena | MovingArena:
        return FixedArena(page_bytes, memory) if fixed else MovingArena(page_bytes, device)

    monkeypatch.setattr(worker, "new_arena", new_arena)
    engine = Engine({"m": llama}, cuda_graphs="padded", pool_bytes=1 << 26, audit=True)
    expected = Engine({"m": llama}).generate("m", PROMPTS, PARAMS)
    assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)
    (one,) = engine.workers.values()
    assert one.graphs
    plans = dict(one.graphs._plans.by_shape)
    for keep in ((), ("m",), ("m",)):
        engine.release(keep)
        assert bool(memory.mapped) == (fixed and bool(keep))
        assert (dict(one.graphs._plans.by_shape) == plans) == fixed
        assert_same_groups(engine.generate("m", PROMPTS, PARAMS), expected)
        if fixed:
            assert dict(one.graphs._plans.by_shape) == plans, "no new shape, and no plan made anew"


CHECK = """
#include <cuda.h>
#include <cstddef>
#include <cstdio>
#include <initializer_list>
int main() {
  printf("%zu %zu %zu %zu ", sizeof(CUmemAllocationProp), offsetof(CUmemAllocationProp, location),
         offsetof(CUmemAllocationProp, allocFlags), sizeof(CUmemAccessDesc));
  printf("%zu", offsetof(CUmemAccessDesc, flags));
  for (int value : {NAMES}) printf(" %d", value);
}
"""


def test_the_drivers_structures_are_those_of_its_header(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="cuda.h comes with Triton")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    names = [name for name in vars(virtual_memory) if name.startswith(("CU_", "CUDA_"))]
    assert len(names) == 5
    (tmp_path / "check.cpp").write_text(CHECK.replace("NAMES", ", ".join(f"(int){name}" for name in names)))
    subprocess.run(["g++", f"-I{include}", "check.cpp", "-o", "check"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=True).stdout
    assert [int(number) for number in re.findall(r"\d+", printed)] == [
        ctypes.sizeof(AllocationProperties),
        AllocationProperties.location.offset,
        AllocationProperties.allocFlags.offset,
        ctypes.sizeof(AccessDescription),
        AccessDescription.flags.offset,
        *(getattr(virtual_memory, name) for name in names),
    ]
