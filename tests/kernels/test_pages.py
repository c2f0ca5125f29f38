"""Pages of a pool: writes, reads and copies compared with loops, by PyTorch and, on a GPU, by the CUDA kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alignpro_kernels import copy_pages, cpp_library, pages, read_kv, write_kv
from alignpro_kernels.build import BuildError, cuda_library

PAGE_BYTES = 3840
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]
NVCC = shutil.which("nvcc")
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def new_arena(n_pages: int, page_bytes: int = PAGE_BYTES) -> Tensor:
    return torch.randint(256, (n_pages, page_bytes), dtype=torch.uint8)


def layer_of(arena: Tensor, dtype: torch.dtype, begin: int, page_size: int, kv_heads: int, head_dim: int) -> Tensor:
    """Return a layer's view of the pages, which starts at byte ``begin`` of every page."""
    count = 2 * page_size * kv_heads * head_dim
    layer = arena[:, begin : begin + count * dtype.itemsize].view(dtype)
    return layer.unflatten(1, (2, page_size, kv_heads, head_dim))


def written_by_loop(keys: Tensor, values: Tensor, layer: Tensor, slots: Tensor) -> None:
    page_size = layer.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot != -1:
            layer[slot // page_size, 0, slot % page_size] = keys[token]
            layer[slot // page_size, 1, slot % page_size] = values[token]


@pytest.mark.parametrize("device", ["cpu", GPU])
@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    n_pages=st.integers(1, 7),
    page_size=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 4, 6, 8, 64]),
    begin=st.integers(0, 3),
    gap=st.integers(0, 3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_writes_and_reads_equal_those_of_a_loop(
    device: str,
    dtype: torch.dtype,
    n_pages: int,
    page_size: int,
    kv_heads: int,
    head_dim: int,
    begin: int,
    gap: int,
    padding: int,
    seed: int,
) -> None:
    """Any geometry: layers and rows at any offset, with padding between; no other byte is written."""
    torch.manual_seed(seed)
    row = kv_heads * head_dim
    arena = new_arena(n_pages, (begin + 2 * page_size * row + gap) * dtype.itemsize)
    geometry = (dtype, begin * dtype.itemsize, page_size, kv_heads, head_dim)
    order = torch.randperm(n_pages * page_size)
    tokens = (len(order) + 1) // 2
    slots = order[:tokens]
    slots = torch.cat([slots, torch.full((padding,), -1)])[torch.randperm(tokens + padding)]
    both = numbers(len(slots), 2 * row + gap, dtype=dtype)  # keys and values are strided rows of one tensor
    keys, values = (x.unflatten(1, (kv_heads, head_dim)) for x in (both[:, :row], both[:, row : 2 * row]))

    expected = arena.clone()
    written_by_loop(keys, values, layer_of(expected, *geometry), slots)
    moved = arena.to(device)
    rows = both.to(device)
    write_kv(
        rows[:, :row].unflatten(1, (kv_heads, head_dim)),
        rows[:, row : 2 * row].unflatten(1, (kv_heads, head_dim)),
        layer_of(moved, *geometry),
        slots.to(device),
    )
    assert torch.equal(moved.cpu(), expected)

    for wanted, got in zip((keys, values), read_kv(layer_of(moved, *geometry), slots.to(device)), strict=True):
        wanted = torch.where((slots >= 0)[:, None, None], wanted.double(), 0.0)  # padding reads zeros
        assert got.dtype == dtype
        assert torch.equal(got.cpu().double(), wanted)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("slots", [[4, -1, 0, -1, 99], [-1, -1, 3, 0, 5], [-1, 99, -1, -1, -1], [5, 4, 3, 2, 1]])
def test_writing_without_the_kernels_does_not_synchronize(slots: list[int], device: str) -> None:
    """This path serves GPUs for which the kernels cannot be built. No branch depends on a slot."""
    arena = new_arena(3)
    expected = arena.clone()
    geometry = (torch.float32, 0, 2, 2, 8)
    keys, values = numbers(5, 2, 8), numbers(5, 2, 8)
    at = torch.tensor(slots)
    kept = (at >= 0) & (at < 6)
    written_by_loop(keys, values, layer_of(expected, *geometry), torch.where(kept, at, -1))
    moved = arena.to(device)
    arguments = [x.to(device) for x in (keys, values, at, kept)]
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        pages._write_without_sync(*arguments[:2], layer_of(moved, *geometry), *arguments[2:])
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.cpu(), expected)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_models_of_different_geometry_share_an_arena(device: str) -> None:
    """Writing a layer changes neither another model's pages nor another layer of the same page."""
    arena = new_arena(6).to(device)
    before = arena.clone()
    small = [layer_of(arena, torch.bfloat16, 640 * layer, 4, 2, 16) for layer in range(3)]  # 512 of each 640 bytes
    large = [layer_of(arena, torch.float32, 1920 * layer, 3, 5, 16) for layer in range(2)]  # all bytes
    mine, others = torch.tensor([1, 4], device=device), torch.tensor([0, 2, 5], device=device)

    slots = (mine[:, None] * 4 + torch.arange(4, device=device)).flatten()
    keys, values = (
        numbers(8, 2, 16, dtype=torch.bfloat16).to(device),
        numbers(8, 2, 16, dtype=torch.bfloat16).to(device),
    )
    write_kv(keys, values, small[1], slots)
    changed = arena != before
    assert not changed[[0, 2, 3, 5]].any()
    assert not changed[:, :640].any()
    assert not changed[:, 640 + 512 :].any()

    slots = (others[:, None] * 3 + torch.arange(3, device=device)).flatten()
    for layer in large:
        write_kv(numbers(9, 5, 16).to(device), numbers(9, 5, 16).to(device), layer, slots)
    assert torch.equal(arena[3], before[3])
    slots = (mine[:, None] * 4 + torch.arange(4, device=device)).flatten()
    assert all(torch.equal(a, b) for a, b in zip(read_kv(small[1], slots), (keys, values), strict=True))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("page_bytes", [1, 30, PAGE_BYTES, 1 << 20])
def test_copied_pages_equal_those_of_a_loop(device: str, page_bytes: int) -> None:
    arena = new_arena(7, page_bytes)
    source, destination = torch.tensor([0, 3, 0]), torch.tensor([6, 1, 2])
    expected = arena.clone()
    for a, b in zip(source.tolist(), destination.tolist(), strict=True):
        expected[b] = arena[a]
    moved = arena.to(device)
    copy_pages(moved, source.to(device), destination.to(device))
    assert torch.equal(moved.cpu(), expected)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_empty_inputs_change_nothing(device: str) -> None:
    arena = new_arena(2).to(device)
    before, none = arena.clone(), torch.empty(0, dtype=torch.int64, device=device)
    layer = layer_of(arena, torch.float32, 0, 3, 5, 16)
    write_kv(torch.empty(0, 5, 16, device=device), torch.empty(0, 5, 16, device=device), layer, none)
    copy_pages(arena, none, none)
    skipped = torch.full((4,), -1, device=device)
    write_kv(numbers(4, 5, 16).to(device), numbers(4, 5, 16).to(device), layer, skipped)
    assert torch.equal(arena, before)
    assert [tuple(x.shape) for x in read_kv(layer, none)] == [(0, 5, 16), (0, 5, 16)]


def test_no_gradient_flows_through_a_pool() -> None:
    layer = layer_of(new_arena(2), torch.float32, 0, 3, 5, 16)
    states = numbers(1, 5, 16).requires_grad_()
    write_kv(states, states, layer, torch.tensor([4]))
    assert not layer.requires_grad
    assert not any(x.requires_grad for x in read_kv(layer, torch.tensor([4])))


def test_errors_name_the_argument() -> None:
    arena = new_arena(2)
    layer, row, slot = layer_of(arena, torch.float32, 0, 3, 5, 16), numbers(1, 5, 16), torch.tensor([0])

    with pytest.raises(ValueError, match="slots: number 0 is 6, outside of -1 to 5"):
        write_kv(row, row, layer, torch.tensor([6]))
    with pytest.raises(ValueError, match="slots: number 0 is -2"):
        read_kv(layer, torch.tensor([-2]))
    with pytest.raises(TypeError, match=r"slots is torch\.int32"):
        write_kv(row, row, layer, slot.int())
    with pytest.raises(ValueError, match=r"slots has shape \(1, 1\)"):
        write_kv(row, row, layer, slot[None])
    with pytest.raises(TypeError, match=r"keys is torch\.bfloat16 and pages is torch\.float32"):
        write_kv(row.bfloat16(), row, layer, slot)
    with pytest.raises(ValueError, match=r"values has shape \(2, 5, 16\): expected \(1, 5, 16\)"):
        write_kv(row, numbers(2, 5, 16), layer, slot)
    with pytest.raises(ValueError, match=r"keys has strides .* a token's row must be contiguous"):
        write_kv(numbers(1, 16, 5).transpose(1, 2), row, layer, slot)
    with pytest.raises(ValueError, match=r"pages has shape \(2, 2, 3, 80\)"):
        read_kv(layer.flatten(3), slot)
    with pytest.raises(ValueError, match=r"pages has strides .* within a page it must be contiguous"):
        read_kv(layer.transpose(3, 4), slot)
    with pytest.raises(ValueError, match="pages must not overlap"):
        read_kv(layer[:1].expand(2, -1, -1, -1, -1), slot)

    with pytest.raises(ValueError, match="source: number 1 is -1, outside of 0 to 1"):
        copy_pages(arena, torch.tensor([0, -1]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="destination: number 0 is 2"):
        copy_pages(arena, torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="destination: page 1 is also a source"):
        copy_pages(arena, torch.tensor([0, 1]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="source has 1 pages, destination 2"):
        copy_pages(arena, torch.tensor([0]), torch.tensor([1, 1]))
    with pytest.raises(TypeError, match=r"arena is torch\.int8"):
        copy_pages(arena.view(torch.int8), slot, slot)
    with pytest.raises(ValueError, match=r"arena has shape .* contiguous"):
        copy_pages(arena[:, ::2], slot, slot)


def test_the_implementation_of_writes_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pages._has_kernels.cache_clear()
    states, layer = torch.ones(1, 2, 4), torch.zeros(2, 2, 8, 2, 4)
    with caplog.at_level("INFO", "alignpro_kernels"):
        for _ in range(2):
            write_kv(states, states, layer, torch.tensor([3]))
    by = "C++" if cpp_library.unavailable() is None else f"PyTorch: {cpp_library.unavailable()}"
    assert caplog.messages == [f"pages are written by {by}"]


def test_plain_pytorch_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    keys, values, slots = torch.randn(5, 2, 4), torch.randn(5, 2, 4), torch.tensor([9, -1, 0, 15, 4])
    layers = torch.zeros(2, 2, 2, 8, 2, 4)
    write_kv(keys, values, layers[0], slots)
    monkeypatch.setattr(pages, "_has_kernels", lambda device: False)
    write_kv(keys, values, layers[1], slots)
    assert torch.equal(layers[0], layers[1]) and layers[0].any()
    with pytest.raises(ValueError, match=r"slots: number 0 is 16, outside of -1 to 15"):
        write_kv(keys, values, layers[1], slots + 7)


def test_without_nvcc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(BuildError, match="no nvcc found: install the CUDA toolkit"):
        cuda_library()


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernels_compile_without_spills(architecture: int, tmp_path: Path) -> None:
    if NVCC is None:
        pytest.skip("no nvcc")
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{architecture}" not in known:
        pytest.skip(f"nvcc does not know sm_{architecture}")
    source = Path(__file__).parents[2] / "csrc" / "cuda" / "pages.cu"
    options = ["-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings", "-cubin"]
    done = subprocess.run([NVCC, *options, str(source), "-o", str(tmp_path / "pages")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "bytes spill stores" in line]
    assert len(spills) == 10  # two kernels in five widths
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills), done.stderr


@pytest.mark.slow
def test_the_operators_build_load_and_trace_without_a_gpu() -> None:
    try:
        pages.load_kernels()
    except BuildError as error:
        if NVCC is not None:
            raise
        pytest.skip(str(error))
    assert [x.alias_info is not None for x in torch.ops.alignpro.write_kv.default._schema.arguments] == [0, 0, 1, 0]
    assert [x.alias_info is not None for x in torch.ops.alignpro.copy_pages.default._schema.arguments] == [1, 0, 0]
    with FakeTensorMode():
        arena = torch.empty(2, PAGE_BYTES, dtype=torch.uint8, device="cuda")
        index = torch.empty(1, dtype=torch.int64, device="cuda")
        layer, row = torch.empty(2, 2, 3, 5, 16, device="cuda"), torch.empty(1, 5, 16, device="cuda")
        assert torch.ops.alignpro.write_kv(row, row, layer, index) is None
        assert torch.ops.alignpro.copy_pages(arena, index, index) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.cuda is None, reason="no CUDA device")
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_the_kernels_run_in_a_captured_graph_and_skip_invalid_slots() -> None:
    assert pages._unavailable("cuda") is None
    arena = new_arena(6).cuda()
    layer = layer_of(arena, torch.bfloat16, 640, 4, 2, 16)
    keys, values = numbers(5, 2, 16, dtype=torch.bfloat16).cuda(), numbers(5, 2, 16, dtype=torch.bfloat16).cuda()
    slots = torch.full((5,), -1, device="cuda")
    source, destination = torch.tensor([5, 99, 0]).cuda(), torch.tensor([3, 0, -1]).cuda()

    def step() -> None:
        write_kv(keys, values, layer, slots)
        copy_pages(arena, source, destination)

    step()  # builds and loads
    torch.library.opcheck(torch.ops.alignpro.write_kv.default, (keys, values, layer, slots))
    torch.library.opcheck(torch.ops.alignpro.copy_pages.default, (arena, source, destination))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    slots.copy_(torch.tensor([3, -1, 22, 24, 2**62]))
    expected = arena.cpu()
    inside = torch.tensor([3, -1, 22, -1, -1])
    written_by_loop(keys.cpu(), values.cpu(), layer_of(expected, torch.bfloat16, 640, 4, 2, 16), inside)
    expected[3] = expected[5]
    graph.replay()
    assert torch.equal(arena.cpu(), expected)
