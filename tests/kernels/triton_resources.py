"""Resource usage of the compiled Triton kernels: registers, shared memory, spills. Needs no GPU.

``python tests/kernels/triton_resources.py`` compiles every kernel in every recorded configuration for every target
and prints a table. With ``--write FILE`` it also writes the table as JSON, against which the tests compare later builds.
A spill in the loop over D would cost more than any tuning gains.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alignpro_kernels import triton_configs
from alignpro_kernels.triton_attention import attention_kernel, combine_kernel
from alignpro_kernels.triton_configs import COMPILE_OPTIONS, attention_tile, candidates, max_stages, sample_candidates
from alignpro_kernels.triton_gradient import accumulate_kernel, gradient_kernel
from alignpro_kernels.triton_logits import logits_kernel, statistics_kernel
from alignpro_kernels.triton_merge import merge_kernel
from alignpro_kernels.triton_sample import choice_kernel, sample_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_STATES = ("query_stride", "query_head_stride", "page_stride", "value_stride", "slot_stride", "head_stride")
_DEPTH = 896  # D: a multiple of every BK, as in real models


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its arguments and its constants."""

    name: str
    kernel: Any
    types: dict[str, str]
    """The Triton type of every argument that is neither None nor a constant."""
    constants: dict[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Resources:
    """The resources used by one program."""

    registers: int
    """Registers per thread; on CDNA the vector registers, including accumulation registers."""
    shared: int
    """Shared memory in bytes."""
    spills: int
    """Local memory per thread in bytes: spilled registers and stack."""


def variants() -> Iterator[Variant]:
    """Yield all kernels in all configurations."""
    for reference in (None, "shared", "separate"):
        of = f" {reference} reference" if reference else ""
        for config in candidates(torch.bfloat16, reference=reference is not None, capped=False):
            yield _logits(f"logits bf16{of}", config, "bf16", reference=reference)
        for config in candidates(torch.bfloat16, reference=reference is not None, capped=True):
            yield _logits(f"logits bf16{of} bias softcap", config, "bf16", bias=True, softcap=True, reference=reference)
    for config in candidates(torch.bfloat16, reference=True, capped=False):
        yield _logits("logits bf16 shared reference LoRA", config, "bf16", reference="shared", rank=16)
    for config in candidates(torch.float32, reference=True, capped=False):
        yield _logits("logits fp32", config, "fp32")
        yield _logits("logits fp32 shared reference", config, "fp32", reference="shared")
    for kind, dtype in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for config in sample_candidates(kind):
            yield _sample(config, dtype)
    for dtype in ("bf16", "fp32"):
        yield _gradient(f"gradient {dtype} alpha", dtype)
        yield _gradient(f"gradient {dtype} alpha eta kappa active softcap bias", dtype, everything=True)
        arguments = _arguments(accumulate_kernel, total="*fp32", du=f"*{dtype}", x=f"*{dtype}")
        constants = {"D": _DEPTH, "ADD": True, "PRECISION": "ieee", **triton_configs.ACCUMULATE}
        warps = triton_configs.ACCUMULATE_WARPS
        yield Variant(f"accumulate {dtype}", accumulate_kernel, arguments, constants, warps, 3)
    everything = dict.fromkeys(("softmax_stats", "logprob", "entropy", "kl", "target_logit", "partials"), "*fp32")
    arguments = _arguments(statistics_kernel, width="*i32", **everything)
    yield Variant("statistics", statistics_kernel, arguments, triton_configs.STATISTICS, 4, 3)
    arguments = _arguments(
        choice_kernel, partials="*fp32", best="*i32", width="*i32", token="*i64", logprob="*fp32", entropy="*fp32"
    )
    arguments["temperature"] = "fp32"
    yield Variant("choice", choice_kernel, arguments, triton_configs.CHOICE, 4, 3)
    arguments = _arguments(merge_kernel, outs="*bf16", lses="*fp32", merged="*bf16")
    yield Variant("merge", merge_kernel, arguments, {"D": 128, "S": 2, "BD": 128, **triton_configs.MERGE}, 4, 3)
    for kind in (torch.bfloat16, torch.float32):
        for dim in (64, 128, 256):
            for rows in sorted(
                {attention_tile(kind, dim, n, plain=True).rows for n in (1, 1 << 20)}
            ):  # a decode step and a prompt
                yield _attention(kind, dim, rows)
        yield _attention(kind, 96, 1 << 20, everything=True)
    yield _attention(torch.bfloat16, 256, 1 << 20, everything=True)
    arguments = _arguments(
        combine_kernel, **dict.fromkeys(("partial_outs", "partial_lses", "lses"), "*fp32"), out="*bf16"
    )
    constants = {"D": 128, "BD": 128, **triton_configs.COMBINE}
    yield Variant("combine", combine_kernel, arguments | {"splits": "i32"}, constants, 4, 3)


def measure(variant: Variant, target: str) -> Resources:
    """Compile a variant for a target of `TARGETS` and return its resource usage."""
    kernel = _plain(variant.kernel)
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    constants |= {(names.index(name),): None for name in names if name not in variant.types | variant.constants}
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = {"vocabulary", "saved_stride", "du_stride", "plane_stride", *_STATES}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name in aligned)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    stages = min(variant.stages, max_stages(TARGETS[target].backend == "hip"))
    options = {"num_warps": variant.warps, "num_stages": stages, **COMPILE_OPTIONS}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return _of_cdna(compiled) if TARGETS[target].backend == "hip" else _of_cuda(compiled)


def _of_cuda(compiled: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = report.stdout + report.stderr
    figure = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(figure["REG"], compiled.metadata.shared, figure["STACK"] + figure["LOCAL"])


def _of_cdna(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"the assembly has no .{name}"
        return int(found[1])

    return Resources(figure("vgpr_count"), compiled.metadata.shared, figure("private_segment_fixed_size"))


def _plain(kernel: Any) -> Any:
    """Unwrap an autotuned kernel."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def _arguments(kernel: Any, **pointers: str) -> dict[str, str]:
    """Return the types of the given pointers and of the kernel's integer arguments."""
    integers = ("rows", "count", "vocabulary", "saved_stride", "du_stride", "plane_stride", "rows_key")
    return pointers | {name: "i32" for name in integers if name in _plain(kernel).arg_names}


def _logits(
    name: str,
    config: triton.Config,
    dtype: str,
    *,
    bias: bool = False,
    softcap: bool = False,
    reference: str | None = None,
    rank: int = 0,
) -> Variant:
    inputs = ["hidden", "weight", "saved"]
    inputs += ["bias"] if bias else []
    inputs += ["lora_b", "lora_hidden"] if rank else []
    inputs += ["ref_hidden", "ref_weight", "ref_saved"] if reference else []
    inputs += ["ref_bias"] if reference and bias else []
    pointers = dict.fromkeys(inputs, f"*{dtype}") | {"target": "*i64", "width": "*i32"}
    pointers |= {"target_logit": "*fp32", "partials": "*fp32"}
    arguments = _arguments(logits_kernel, **pointers) | {"temperature": "fp32"}
    if softcap:
        arguments["softcap"] = "fp32"
    constants = {
        "D": _DEPTH,
        "REF_D": _DEPTH if reference else 0,
        "SHARED": reference == "shared",
        "R": rank,
        "PRECISION": "ieee",
    }
    return _tiled(name, logits_kernel, arguments, constants, config)


def _sample(config: triton.Config, dtype: str) -> Variant:
    pointers = {"hidden": f"*{dtype}", "weight": f"*{dtype}", "seeds": "*i64", "width": "*i32", "best": "*i32"}
    arguments = _arguments(sample_kernel, partials="*fp32", temperatures="*fp32", **pointers) | {"temperature": "fp32"}
    return _tiled(f"sample {dtype}", sample_kernel, arguments, {"D": _DEPTH, "R": 0, "PRECISION": "ieee"}, config)


def _tiled(
    name: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], config: triton.Config
) -> Variant:
    tile = config.kwargs
    warps, stages = config.num_warps, config.num_stages
    shape = f"{tile['BM']}x{tile['BN']}x{tile['BK']} w{warps} s{stages}" + (" persistent" if tile["WAVES"] else "")
    return Variant(f"{name} {shape}", kernel, arguments, constants | tile, warps, stages)


def _gradient(name: str, dtype: str, *, everything: bool = False) -> Variant:
    figures = ["partials", "softmax_stats", "alpha"]
    pointers = {"saved": f"*{dtype}", "target": "*i64", "width": "*i32"}
    if everything:
        figures += ["entropy", "kl", "eta", "kappa", "temperatures", "bias_gradient"]
        pointers |= {"ref_saved": f"*{dtype}", "active": "*i64"}
    arguments = _arguments(gradient_kernel, **pointers, **dict.fromkeys(figures, "*fp32")) | {"temperature": "fp32"}
    if everything:
        arguments["softcap"] = "fp32"
    constants = {"ADD": True, **triton_configs.GRADIENT}
    return Variant(name, gradient_kernel, arguments, constants, 4, 3)


def _attention(dtype: torch.dtype, dim: int, rows: int, *, everything: bool = False) -> Variant:
    shape = attention_tile(dtype, dim, rows, plain=not everything)
    name = "fp32" if dtype == torch.float32 else "bf16"
    pointers = dict.fromkeys(("query", "pages", "out"), f"*{name}") | {"lses": "*fp32"}
    indices = ["cu_queries", "page_table", "key_lengths", "query_positions", "key_starts"]
    pointers |= dict.fromkeys(indices, "*i32")
    integers = ["sequences", "max_keys", "split_keys", *_STATES, "table_stride", "rows_all"] + ["window"] * everything
    floats = ["scale"] + ["softcap"] * everything
    types = pointers | dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    constants = {
        "table_step": 1,
        "D": dim,
        "G": 7,
        "PAGE": 16,
        "BS": triton_configs.SEQUENCE_BLOCK,
        "PRECISION": "ieee",
    }
    constants |= {"BR": shape.rows, "BK": shape.keys, "BD": shape.width}
    name += f" D{dim}" + (" softcap window" if everything else "") + f" {shape.rows}x{shape.keys}"
    full = f"attention {name} w{shape.warps} s{shape.stages}"
    return Variant(full, attention_kernel, types, constants, shape.warps, shape.stages)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="target to compile for (default: all)")
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this")
    parser.add_argument("--write", type=Path, help="also write the table to this JSON file")
    chosen = parser.parse_args(arguments)
    table: dict[str, dict[str, dict[str, int]]] = {}
    print(f"{'kernel':72} {'target':8} {'registers':>9} {'shared':>8} {'spills':>7}")
    for variant in variants():
        if chosen.only not in variant.name:
            continue
        for target in chosen.target or TARGETS:
            found = measure(variant, target)
            table.setdefault(variant.name, {})[target] = asdict(found)
            print(f"{variant.name:72} {target:8} {found.registers:9} {found.shared:8} {found.spills:7}", flush=True)
    if chosen.write:
        budget = {"torch": torch.__version__, "triton": triton.__version__, "kernels": table}
        chosen.write.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
