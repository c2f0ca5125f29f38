"""A lower bound on the time of a case, from its arithmetic, its memory traffic and the measured rates of the device.

The time of a decode tick is bounded by memory traffic (every weight is read once, and every key and value once however
many sequences attend to it) and by its matrix products. The floor is the sum over the ticks of the larger of the two, plus
the matrix products of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.clock import Clock
from benchmarks.engine.cases import Case
from benchmarks.workload import ModelShape

COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
SLOW_PRODUCT = 0.05
"""Seconds of a product of a quarter of that size from which on it is measured instead: without arithmetic in bfloat16, a
processor may need a minute for the large one."""
REPEATS = 7
QUICK_FACTOR = 16


@dataclass(frozen=True)
class DeviceRates:
    """The measured rates of a device."""

    bytes_per_s: float
    """Bytes read plus bytes written per second, in a large copy."""
    flops_per_s: float
    """In a large matrix product in the models' dtype."""


def measure_rates(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> DeviceRates:
    """Measure the best rates of several copies and matrix products; with ``quick``, of small ones, which are not valid."""
    clock = Clock(device)

    def shortest(call: Callable[[], object]) -> float:
        return min(clock.time(call, calls=1).total for _ in range(REPEATS))

    smaller = QUICK_FACTOR if quick else 1
    source = torch.ones(COPY_BYTES[device.type] // smaller, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copying = shortest(lambda: copy.copy_(source))
    size = MATMUL_SIZE[device.type] // smaller
    quarter = _product(size // 4, dtype, device)
    quarter()  # once before, since the first call sets up the library
    if clock.time(quarter, calls=1).total > SLOW_PRODUCT:
        size //= 4
    multiplying = shortest(_product(size, dtype, device))
    return DeviceRates(2 * source.numel() / copying, 2 * size**3 / multiplying)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)


@dataclass(frozen=True)
class _Stage:
    """The work of one model in a case."""

    shape: ModelShape
    prefill: int
    """Prompt tokens to compute; shared ones count once."""
    context: int
    """Prompt tokens per sequence."""
    sequences: int
    new: int


def floor_seconds(case: Case, rates: DeviceRates, dtype: torch.dtype) -> dict[str, float]:
    """Return the minimum seconds of ``prefill`` and ``decode``."""
    prefill = sum(_prefill_flops(stage) for stage in _stages(case)) / rates.flops_per_s
    decode = sum(_decode_seconds(stage, rates, dtype.itemsize) for stage in _stages(case))
    return {"prefill": prefill, "decode": decode}


def _stages(case: Case) -> list[_Stage]:
    w = case.workload
    if not case.chain:
        return [_Stage(w.target, case.prefill, w.prompt, case.sequences, w.response)]
    rewrites = w.prompts * w.K
    return [
        _Stage(w.prompter, case.prefill, w.prompter_input, rewrites, w.rewrite),
        _Stage(w.target, w.before + rewrites * (w.rewrite + w.after), w.target_input, w.chains, w.response),
    ]


def num_weights(shape: ModelShape, *, head: bool) -> int:
    """Return the number of weights in the matrix products of one token."""
    queries, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    layer = 2 * shape.hidden * queries + 2 * shape.hidden * kv + 3 * shape.hidden * shape.intermediate
    return shape.layers * layer + (shape.vocabulary * shape.hidden if head else 0)


def _prefill_flops(stage: _Stage) -> float:
    shape = stage.shape
    attention = 2 * shape.layers * shape.heads * shape.head_width * stage.context  # half of the products are masked
    return stage.prefill * (2.0 * num_weights(shape, head=False) + attention)


def _decode_seconds(stage: _Stage, rates: DeviceRates, itemsize: int) -> float:
    shape = stage.shape
    weights = num_weights(shape, head=True)
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_width * itemsize  # per token
    seconds = 0.0
    for drawn in range(1, stage.new):  # the first token is sampled from the prompt's hidden states
        read = weights * itemsize + kv_bytes * (stage.prefill + stage.sequences * drawn)
        attention = 4 * shape.layers * shape.heads * shape.head_width * (stage.context + drawn)
        flops = stage.sequences * (2.0 * weights + attention)
        seconds += max(read / rates.bytes_per_s, flops / rates.flops_per_s)
    return seconds
