"""The backends of the project's kernels."""

from __future__ import annotations

from collections.abc import Iterator

from alignpro.doctor.findings import Finding, first_error

_BACKENDS = {
    "triton": "runs on the GPU",
    "cpp": "runs on the CPU",
    "torch": "runs where no faster one does",
    "reference": "runs only when requested by name: the specification",
}
"""When each available kernel backend is used."""


def backends() -> Iterator[Finding]:
    """Which backends run here, and why the others do not."""
    import alignpro_kernels
    from alignpro_kernels import cpp_library

    for name, reason in alignpro_kernels.backends().items():
        if reason is not None:
            again = "python -m alignpro_kernels.build retries and shows the full output; until then torch is used"
            yield Finding("Kernels", name, "off", first_error(reason), again if name == "cpp" else "")
        else:
            instructions = f", with {cpp_library.instructions()} instructions" if name == "cpp" else ""
            yield Finding("Kernels", name, "ok", _BACKENDS[name] + instructions)


def bfloat16_weights() -> Iterator[Finding]:
    """How a model in bfloat16 runs on the CPU."""
    from alignpro.models.cpu.packed_linear import no_kernels
    from alignpro_kernels import cpp_library

    if (reason := no_kernels()) is None:
        own = {"avx512_bf16": "by AVX512_BF16", "amx": "by AMX"}
        how = own.get(cpp_library.instructions(), "computed in float32: slower")
        detail = {
            0: "stored in memory, widened to float32 in registers; ALIGNPRO_CPU_BFLOAT16=rounded asks for products in it",
            1: f"states are rounded to it for products, {how}",
            2: f"states are split into sums of two for products, {how}",
        }[cpp_library.state_parts()]
        yield Finding("Kernels", "bfloat16", "ok", detail)
    else:
        yield Finding("Kernels", "bfloat16", "off", f"slow on this CPU, take float32: {first_error(reason)}")


def attention_libraries() -> Iterator[Finding]:
    """The libraries of attention kernels, and which of them a trial on the GPU chooses for a model of a usual shape."""
    from alignpro_kernels import varlen_kernels

    for kernels in varlen_kernels.KERNELS:
        reason = kernels.unavailable()
        used = "for prefill and packed training, where a trial finds it fastest"
        yield Finding("Attention", kernels.name, "off" if reason else "ok", reason or used)
    if varlen_kernels.available():
        try:
            yield from _attention_choices()
        except RuntimeError as error:
            yield Finding("Attention", "trial", "problem", first_error(str(error)))


def _attention_choices() -> Iterator[Finding]:
    import torch

    from alignpro.models import packed_attention, packed_choice
    from alignpro_kernels import prefill_choice, triton_attention

    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    paged = prefill_choice.Geometry(32, 8, 128, 16, dtype, softcap=False)
    prefill = prefill_choice.measured(paged, device, triton_attention.paged_attention)
    yield Finding("Attention", "prefill", "ok", f"{prefill}, for {paged}")
    packed = packed_choice.Geometry(32, 8, 128, dtype, softcap=False)
    training = packed_choice.measured(packed, device, packed_attention.padded_attention)
    yield Finding("Attention", "packed training", "ok", f"{training}, for {packed}")
