"""Checks of operator arguments. Every error names the argument, what it is and what it should be.

On the CPU, an invalid value (a target out of range, a temperature that is not positive) raises an exception. On a GPU
that would require a synchronisation, so values are checked by a device-side assertion, as in PyTorch's own index checks:
a failure is reported at the next synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignpro_kernels.types import LoRA

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Check hidden (..., D), weight (V, D) and bias (V,): the same device, and dtypes that `_check_product` allows."""
    _check_product("hidden", hidden, "weight", weight)
    _check_bias("bias", bias, weight)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: it must be positive, or None to disable it")


def check_lora(lora: LoRA | None, hidden: Tensor, weight: Tensor) -> None:
    """Check a (r, D) and b (V, r): the dtype and device of the hidden states."""
    if lora is None:
        return
    vocabulary, width = weight.shape
    if lora.a.ndim != 2 or lora.b.ndim != 2 or lora.a.shape[1] != width or lora.b.shape != (vocabulary, len(lora.a)):
        raise ValueError(
            f"lora: a has shape {tuple(lora.a.shape)} and b {tuple(lora.b.shape)}: expected (r, {width}) and "
            f"({vocabulary}, r)"
        )
    for name, value in (("a", lora.a), ("b", lora.b)):
        if value.dtype != hidden.dtype or value.device != hidden.device:
            raise ValueError(
                f"lora: {name} is {value.dtype} on {value.device}, hidden is {hidden.dtype} on {hidden.device}: "
                "they must agree"
            )


def check_mask(mask: Tensor | None, hidden: Tensor) -> None:
    """Check mask: (...,) bool, or None."""
    if mask is not None:
        _check_rows("mask", mask, hidden, (torch.bool,))


def check_target(target: Tensor, hidden: Tensor, vocabulary: int, mask: Tensor | None) -> None:
    """Check target: (...,) int64, within the vocabulary wherever the mask is set."""
    _check_rows("target", target, hidden, (torch.int64,))
    inside = (target >= 0) & (target < vocabulary)
    if mask is not None:
        inside = inside | ~mask
    if target.device.type == "cpu":
        if not bool(inside.all()):
            row = int((~inside).flatten().nonzero()[0])
            raise ValueError(
                f"target: row {row} has {int(target.flatten()[row])}, outside the vocabulary of {vocabulary}"
                + ("" if mask is not None else "; use mask to leave out rows that do not count")
            )
    else:
        torch._assert_async(inside.all(), f"target: a value is outside the vocabulary of {vocabulary}")


def check_temperature(temperature: float | Tensor, hidden: Tensor, *, greedy: bool = False) -> None:
    """Check temperature: a number, or one per row (...,); positive, or with ``greedy`` not negative."""
    bound = "not negative" if greedy else "positive"
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            _check_rows("temperature", temperature, hidden, FLOATS)
        if not temperature.numel():
            return
        if temperature.device.type != "cpu":
            allowed = temperature >= 0 if greedy else temperature > 0
            torch._assert_async(allowed.all(), f"temperature: a value is not {bound}")
            return
        lowest = float(temperature.min())
    else:
        lowest = float(temperature)
    if not (lowest > 0 or (greedy and lowest == 0)):
        raise ValueError(
            f"temperature: got {lowest}, it must be {bound}" + ("" if greedy else " (only linear_sample takes 0)")
        )


def check_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    """Check ref_hidden (..., D'), ref_weight (V, D') or None for a shared head, and ref_bias (V,)."""
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{name} given without ref_hidden: pass the reference's hidden states too")
        return
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden has shape {tuple(ref_hidden.shape)}: its rows must be those of hidden, "
            f"{tuple(hidden.shape[:-1])}"
        )
    head = weight if ref_weight is None else ref_weight
    _check_product("ref_hidden", ref_hidden, "weight" if ref_weight is None else "ref_weight", head)
    if head.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight has a vocabulary of {head.shape[0]}, weight one of {weight.shape[0]}")
    _check_bias("ref_bias", ref_bias, head)
    if ref_hidden.dtype != hidden.dtype or ref_hidden.device != hidden.device:
        raise ValueError(
            f"ref_hidden is {ref_hidden.dtype} on {ref_hidden.device}, "
            f"hidden {hidden.dtype} on {hidden.device}: they must agree"
        )


def check_seeds(seeds: Tensor, hidden: Tensor) -> None:
    """Check seeds: (...,) int64, one per row."""
    _check_rows("seeds", seeds, hidden, (torch.int64,))


def check_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> None:
    """Check outs, S of shape (..., D), and lses, S of shape (...,)."""
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs has {len(outs)} parts, lses {len(lses)}: they must be equally many, at least one")
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape:
            raise ValueError(f"outs[{index}] has shape {tuple(out.shape)}, outs[0] {tuple(outs[0].shape)}")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"lses[{index}] has shape {tuple(lse.shape)}, expected {tuple(out.shape[:-1])}")


def _check_product(left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    """Check the states and the weight of a product: one dtype, or on a CPU float32 states and a 16-bit weight."""
    if left.dtype not in FLOATS:
        raise TypeError(f"{left_name} is {left.dtype}: expected one of {', '.join(map(str, FLOATS))}")
    if left.ndim < 1 or right.ndim != 2 or left.shape[-1] != right.shape[1]:
        raise ValueError(
            f"{left_name} has shape {tuple(left.shape)} and {right_name} {tuple(right.shape)}: "
            "expected (..., D) and (V, D)"
        )
    if right.numel() == 0:
        raise ValueError(
            f"{right_name} has shape {tuple(right.shape)}: the vocabulary and the hidden size must not be empty"
        )
    widened = left.is_cpu and left.dtype == torch.float32 and right.dtype in (torch.bfloat16, torch.float16)
    if right.dtype != left.dtype and not widened:
        raise TypeError(f"{right_name} is {right.dtype} and {left_name} is {left.dtype}: they must agree")
    if right.device != left.device:
        raise ValueError(f"{right_name} is on {right.device} and {left_name} is on {left.device}: they must agree")


def _check_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    if bias.dtype != weight.dtype:
        raise TypeError(f"{name} is {bias.dtype} and its weight is {weight.dtype}: they must agree")
    if bias.device != weight.device:
        raise ValueError(f"{name} is on {bias.device} and its weight is on {weight.device}: they must agree")


def _check_rows(name: str, value: Tensor, hidden: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}: expected {' or '.join(map(str, dtypes))}")
    if value.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: expected one value per row of hidden, {tuple(hidden.shape[:-1])}"
        )
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device} and hidden is on {hidden.device}: they must agree")
