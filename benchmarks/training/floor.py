"""A lower bound on the time of a step: that of its generation, and the matrix products of the passes that learn from it."""

from __future__ import annotations

import torch

from benchmarks.device import dtype_name
from benchmarks.engine.cases import Case
from benchmarks.engine.floor import DeviceRates, floor_seconds, measure_rates, num_weights
from benchmarks.workload import Workload


def floor_by_dtype(
    workload: Workload, device: torch.device, *, lora: bool, quick: bool = False
) -> dict[str, dict[str, float]]:
    """Return dtype → the least seconds of ``rollout`` and ``learn``, from rates that are measured now; see `measure_rates`."""
    dtypes = (torch.float32, torch.bfloat16)
    return {
        dtype_name(dtype): step_floor(workload, measure_rates(device, dtype, quick=quick), dtype, lora=lora)
        for dtype in dtypes
    }


def step_floor(workload: Workload, rates: DeviceRates, dtype: torch.dtype, *, lora: bool) -> dict[str, float]:
    """Return the least seconds of ``rollout`` and ``learn`` of a step whose sequences have their full lengths.

    Reference and policy compute each prompt once and every rewrite, and the policy's backward pass has one product for
    each of the forward pass, or two where all weights are trained. Attention and the optimizer are not counted.
    """
    rollout = floor_seconds(Case(workload, "", chain=True), rates, dtype)
    w, shape = workload, workload.prompter
    rewritten = w.prompts * w.K * w.rewrite
    body = num_weights(shape, head=False) * (w.meta_prompt + w.prompts * w.prompt + rewritten)
    head = shape.vocabulary * shape.hidden * rewritten
    passes = 3 if lora else 4
    return {"rollout": sum(rollout.values()), "learn": 2.0 * passes * (body + head) / rates.flops_per_s}
