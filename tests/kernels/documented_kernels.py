"""The libraries of `varlen_kernels` as their signatures and documentation say, computed by the reference on the CPU.

A call must bind to the recorded signature and keep to what the library requires of its arguments.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from alignpro_kernels.varlen import ScoreOptions, Varlen, VarlenKernels
from alignpro_kernels.varlen_kernels import KERNELS
from alignpro_kernels.varlen_reference import ReferenceKernels

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "flash_attn_signatures.json").read_text())["packages"]
LIBRARIES: dict[str, VarlenKernels] = dict(
    zip(("flash-attn 4", "flash-attn 3", "flash-attn 2", "torch"), KERNELS, strict=True)
)
REFERENCE = ReferenceKernels()


def signature(package: str, function: str) -> inspect.Signature:
    """Return a function's signature as recorded from its source."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        inspect.Parameter(parameter, kind, default=inspect.Parameter.empty if text is None else ast.literal_eval(text))
        for parameter, text in RECORD[package]["functions"][function].items()
    )


def schema_signature(operator: str) -> inspect.Signature:
    """Return the signature of one of PyTorch's own operators."""
    arguments = getattr(torch.ops.aten, operator).default._schema.arguments
    return inspect.Signature(
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY if each.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=each.default_value if each.has_default_value() else inspect.Parameter.empty,
        )
        for each in arguments
    )


def call_of(a: dict[str, Any], causal: str, names: tuple[str, str, str, str]) -> tuple[Varlen, ScoreOptions]:
    """Check the arguments that all libraries have in some form; return the call and the other options."""
    cu_q, cu_k, max_q, max_k = (a[name] for name in names)
    lengths = a.get("seqused_k")
    for x in (cu_q, cu_k, *([] if lengths is None else [lengths])):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert len(cu_q) == len(cu_k)
    counts = cu_q.diff()
    sizes = cu_k.diff() if lengths is None else lengths
    assert 1 < max_q >= int(counts.max()) and max_k >= int(sizes.max()) and int(counts.min()) >= 0
    assert all(a[name].stride(-1) == 1 for name in ("q", "k", "v", "query", "key", "value") if name in a)
    window = a["window_size"] if "window_size" in a else (a["window_size_left"], a["window_size_right"])
    unlimited = (-1, -1) if -1 in window else (None, None)
    assert window in (unlimited, (window[0], 0)) and (window == unlimited or a[causal])
    scale = a.get("softmax_scale", a.get("scale"))
    options = ScoreOptions(scale, a.get("softcap", 0.0) or None, None if window == unlimited else window[0] + 1)
    return Varlen(cu_q, cu_k, max_q, max_k, a[causal], lengths), options


LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
ATEN_LENGTHS = ("cum_seq_q", "cum_seq_k", "max_q", "max_k")


def forward(a: dict[str, Any], names: tuple[str, str, str, str], causal: str, empty: float) -> tuple[Tensor, Tensor]:
    varlen, options = call_of(a, causal, names)
    q, k, v = (a[x] for x in (("query", "key", "value") if "query" in a else ("q", "k", "v")))
    out, lse = REFERENCE.forward(q, k, v, varlen, options)
    return out, lse.masked_fill(lse == -torch.inf, empty).T.contiguous()  # (H, T)


def backward(a: dict[str, Any], names: tuple[str, str, str, str], causal: str, lse: str) -> tuple[Tensor, ...]:
    varlen, options = call_of(a, causal, names)
    q, k, v = (a[x] for x in (("query", "key", "value") if "query" in a else ("q", "k", "v")))
    gradient = a["grad_out"] if "grad_out" in a else a["dout"]
    assert a[lse].dtype == torch.float32 and a[lse].is_contiguous() and a[lse].shape == (q.shape[1], len(q))
    assert a["out"].dtype == gradient.dtype == q.dtype and a["out"].shape == gradient.shape == q.shape
    return REFERENCE.backward(gradient, q, k, v, a["out"], a[lse].T, varlen, options)


def flash2_forward(a: dict[str, Any]) -> tuple[Tensor, ...]:
    assert a["dropout_p"] == 0 and a["alibi_slopes"] is None and a["block_table"] is None
    return *forward(a, LENGTHS, "causal", torch.inf), torch.empty(0), torch.empty(2)


def flash2_backward(a: dict[str, Any]) -> Tensor:
    assert a["dropout_p"] == 0
    for name, gradient in zip(("dq", "dk", "dv"), backward(a, LENGTHS, "causal", "softmax_lse"), strict=True):
        a[name].copy_(gradient)
    return torch.empty(0)


def flash3_forward(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    assert a["num_splits"] == 1 and a["return_attn_probs"] and a["attention_chunk"] == 0
    return forward(a, LENGTHS, "causal", -torch.inf)


def flash3_backward(a: dict[str, Any]) -> Tensor:
    for name, gradient in zip(("dq", "dk", "dv"), backward(a, LENGTHS, "is_causal", "softmax_lse"), strict=True):
        a[name].copy_(gradient)
    return torch.empty(0)


def flash4_forward(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    assert a["num_splits"] == 1 and a["return_lse"] and a["page_table"] is None and a["qv"] is None
    return forward(a, LENGTHS, "causal", -torch.inf)


def flash4_backward(a: dict[str, Any]) -> tuple[Tensor, ...]:
    assert isinstance(a["softcap"], float) and a["dlse"] is None
    return backward(a, LENGTHS, "causal", "lse")


def torch_forward(a: dict[str, Any]) -> tuple[Tensor, ...]:
    assert a["dropout_p"] == 0 and not a["return_debug_mask"]
    return *forward(a, ATEN_LENGTHS, "is_causal", torch.inf), torch.empty(2), torch.empty(0), torch.empty(0)


def torch_backward(a: dict[str, Any]) -> tuple[Tensor, ...]:
    assert a["dropout_p"] == 0
    return backward(a, ATEN_LENGTHS, "is_causal", "logsumexp")


FUNCTIONS: dict[str, dict[str, Callable[[dict[str, Any]], object]]] = {
    "flash-attn 2": {
        "_flash_attn_varlen_forward": flash2_forward,
        "_flash_attn_varlen_backward": flash2_backward,
    },
    "flash-attn 3": {"flash_attn_varlen_func": flash3_forward, "_flash_attn_backward": flash3_backward},
    "flash-attn 4": {"flash_attn_varlen_func": flash4_forward, "_flash_attn_bwd": flash4_backward},
    "torch": {"_flash_attention_forward": torch_forward, "_flash_attention_backward": torch_backward},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the libraries' functions as documented, on the CPU."""
    for package, functions in FUNCTIONS.items():
        target: Any = torch.ops.aten
        if package in RECORD:
            *parents, _ = path = RECORD[package]["module"].split(".")
            for depth in range(1, len(path) + 1):
                name = ".".join(path[:depth])
                if name not in sys.modules or depth == len(path):
                    monkeypatch.setitem(sys.modules, name, ModuleType(name))
            target = sys.modules[".".join([*parents, path[-1]])]
        for name, function in functions.items():
            own = signature(package, name) if package in RECORD else schema_signature(name)

            def call(_own: inspect.Signature = own, _function: Any = function, **arguments: Any) -> object:
                bound = _own.bind(**arguments)
                bound.apply_defaults()
                return _function(bound.arguments)

            monkeypatch.setattr(target, name, call, raising=False)
