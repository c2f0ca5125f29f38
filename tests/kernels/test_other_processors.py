"""The kernels of csrc/cpu on other processors: compiled for aarch64, run by qemu-user, compared with float64.

Debian has the programs: ``apt-get install g++-aarch64-linux-gnu qemu-user``. Without them only this processor's program runs.
The kernels need two headers of torch but not its library, so the operators around them are compiled and not linked.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

from alignpro_kernels.build import _FLAGS
from alignpro_kernels.noise import gumbel_noise

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMPILERS = {"here": "g++", "aarch64": "aarch64-linux-gnu-g++", "neon": "aarch64-linux-gnu-g++"}
"""Of the generic kernels here and on aarch64, and of those with its vector instructions."""
INCLUDES = [flag for directory in include_paths() for flag in ("-isystem", directory)]

Kernel = Callable[..., np.ndarray]
"""(kernel, sizes, arrays) → its output as bytes reinterpreted by ``dtype``."""


def compiler_for(processor: str) -> str:
    if (found := shutil.which(COMPILERS[processor])) is None:
        pytest.skip(f"no {COMPILERS[processor]}")
    return found


@pytest.fixture(scope="module", params=list(COMPILERS))
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    compiler, program = compiler_for(request.param), tmp_path_factory.mktemp("kernels") / request.param
    emulator = []
    if request.param != "here":
        if (found := shutil.which("qemu-aarch64")) is None:
            pytest.skip("no qemu-aarch64: install qemu-user")
        emulator = [found]
    source = Path(__file__).with_name("run_kernels.cpp")
    command = [
        compiler,
        *_FLAGS,
        *(['-DISA="isa_neon.h"'] if request.param == "neon" else []),
        "-static",
        *INCLUDES,
        "-I",
        str(ROOT / "csrc" / "cpu"),
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)

    def run(name: str, *sizes: int, inputs: list[np.ndarray], dtype: type = np.float32) -> np.ndarray:
        arguments = [*emulator, str(program), name, *map(str, sizes)]
        data = b"".join(x.astype(np.int64 if x.dtype.kind == "i" else np.float32).tobytes() for x in inputs)
        return np.frombuffer(subprocess.run(arguments, input=data, capture_output=True, check=True).stdout, dtype)

    return run


def normal(*shape: int) -> np.ndarray:
    """Random values that are exact in bfloat16, so that storage in 16 bits changes none."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.bfloat16().double().numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    assert np.abs(found.reshape(expected.shape) - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (7, 33), (13, 96)])
def test_products(kernel: Kernel, rows: int, depth: int) -> None:
    x, panel = normal(rows, depth), normal(depth, 32)
    assert_close(kernel("multiply", rows, depth, inputs=[x, panel]), 1 + x @ panel)
    assert_close(kernel("multiply_transposed", rows, depth, inputs=[x.T.copy(), panel]), 1 + x @ panel)
    a = normal(5, depth)
    assert_close(kernel("project", rows, 5, depth, inputs=[x, a]), 0.5 * x @ a.T)


@pytest.mark.parametrize(("rows", "depth"), [(1, 2), (7, 34), (13, 96)])
def test_products_with_weights_in_bfloat16(kernel: Kernel, rows: int, depth: int) -> None:
    x, panel, w = normal(rows, depth), normal(depth, 32), normal(5, depth - 1)
    assert_close(kernel("multiply_bfloat16", rows, depth, inputs=[x, panel]), 1 + x @ panel)
    assert_close(kernel("dot_bfloat16", rows, 5, depth - 1, inputs=[x[:, 1:].copy(), w]), x[:, 1:] @ w.T)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("rows", "outputs", "depth"), [(1, 2, 2), (7, 9, 34), (16, 32, 64), (13, 17, 96), (39, 40, 190)]
)
def test_products_of_rows_in_bfloat16(kernel: Kernel, rows: int, outputs: int, depth: int, parts: int) -> None:
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(1))
    x[0, :2] = torch.tensor([1.00390625, 1.01171875])  # ties: to 1 and to 1.015625
    first = x.bfloat16()
    narrow = first.double() + ((x - first.float()).bfloat16().double() if parts == 2 else 0)
    panel, w = normal(depth, 32), normal(outputs, depth)
    for name in ("multiply_narrow", "multiply_amx"):  # that in an emulation
        assert_close(kernel(name, rows, depth, parts, inputs=[x.numpy(), panel]), 1 + narrow.numpy() @ panel)
    for name in ("dot_narrow", "dot_amx"):
        assert_close(kernel(name, rows, outputs, depth, parts, inputs=[x.numpy(), w]), narrow.numpy() @ w.T)


@pytest.mark.parametrize("outputs", [32, 9])
def test_packing(kernel: Kernel, outputs: int) -> None:
    weight = normal(outputs, 11)
    packed = np.zeros((11, 32))
    packed[:, :outputs] = weight.T
    assert (kernel("pack", outputs, 11, inputs=[weight]).reshape(11, 32) == packed).all()


@pytest.mark.parametrize("dim", [8, 24, 52])
def test_rows_of_a_layer(kernel: Kernel, dim: int) -> None:
    x, y, angle = normal(dim), normal(dim)[::-1], normal(dim)
    assert_close(kernel("rms_norm", dim, inputs=[x, y]), x / np.sqrt((x**2).mean() + 1e-5) * (y + 1))
    cos, sin = (f(angle).astype(np.float32).astype(float) for f in (np.cos, np.sin))
    turned = np.concatenate([-x[dim // 2 :], x[: dim // 2]])
    assert_close(kernel("rotate", dim, inputs=[x, cos, sin]), x * cos + turned * sin)
    gate, up = 20 * normal(8 * dim), normal(8 * dim)[::-1]
    assert_close(kernel("gate", 8 * dim, inputs=[gate, up]), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("softcap", [0, 3])
@pytest.mark.parametrize("element", [0, 1, 2], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("count", "dim", "keys"), [(1, 16, 5), (7, 20, 150), (12, 64, 300)])
def test_attention(kernel: Kernel, count: int, dim: int, keys: int, element: int, softcap: int) -> None:
    query, key, value = normal(count, dim), normal(keys, dim), normal(keys, dim)[::-1]
    last = 1 + (np.arange(count) * 37 + keys - 1) % keys
    first = np.maximum(0, last - 130)  # a sliding window
    scores = 0.25 * query @ key.T
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    j = np.arange(keys)
    scores[(j < first[:, None]) | (j >= last[:, None])] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights @ value / weights.sum(-1, keepdims=True)
    inputs = [query, np.stack([key, value]), first, last]
    assert_close(kernel("attend", count, dim, keys, element, softcap, inputs=inputs), expected, 4e-6)


@pytest.mark.parametrize("softcap", [0, 5])
@pytest.mark.parametrize("columns", [16, 107])
def test_statistics_and_gradient_of_the_head(kernel: Kernel, columns: int, softcap: int) -> None:
    rows, stride = 5, (columns + 15) // 16 * 16
    u, w, bias = 3 * normal(rows, stride), 3 * normal(rows, stride)[::-1], normal(stride)
    inverse_tau, target = np.linspace(0.5, 2, rows), np.arange(rows) * 7 % columns
    logits = torch.tensor(u[:, :columns], requires_grad=True)
    offset = torch.tensor(bias[:columns], requires_grad=True)

    def logprobs(x: torch.Tensor) -> torch.Tensor:
        capped = softcap * torch.tanh((x + offset) / softcap) if softcap else x + offset
        return (capped * torch.tensor(inverse_tau.astype(np.float32).astype(float))[:, None]).log_softmax(-1)

    logp, logq = logprobs(logits), logprobs(torch.tensor(w[:, :columns])).detach()
    entropy, kl = -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)
    (logp[torch.arange(rows), target] + 0.25 * entropy + 0.5 * kl).sum().backward()

    out = kernel("head", rows, columns, softcap, inputs=[u, w, inverse_tau, bias, target])
    assert_close(out[:rows], entropy.detach().numpy(), 2e-5)
    assert_close(out[rows : 2 * rows], kl.detach().numpy(), 2e-5)
    du, bias_gradient = out[2 * rows : -stride].reshape(rows, stride), out[-stride:]
    assert logits.grad is not None and offset.grad is not None
    assert_close(du[:, :columns], logits.grad.numpy(), 2e-5)
    assert_close(bias_gradient[:columns], offset.grad.numpy(), 2e-5)


def test_samples_have_the_noise_of_every_other_backend(kernel: Kernel) -> None:
    rows, columns = 64, 107
    logits, seeds = normal(rows, 112), np.arange(rows) * 7919 - 100
    noise = gumbel_noise(torch.tensor(seeds), columns, torch.float64, start=5).numpy()
    noise[-1] = 0  # greedy
    expected = 5 + (logits[:, :columns] + noise).argmax(-1)
    assert (kernel("sample", rows, columns, inputs=[logits, seeds], dtype=np.int64) == expected).all()


@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_every_source_compiles_for_aarch64(source: str) -> None:
    command = [compiler_for("aarch64"), *_FLAGS, "-fopenmp", "-Werror", "-fsyntax-only", *INCLUDES]
    done = subprocess.run([*command, str(ROOT / "csrc" / "cpu" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
