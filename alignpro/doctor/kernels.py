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
    from alignpro_kernels import cpp_library, flash_attention

    for name, reason in alignpro_kernels.backends().items():
        if reason is not None:
            again = "python -m alignpro_kernels.build retries and shows the full output; until then torch is used"
            yield Finding("Kernels", name, "off", first_error(reason), again if name == "cpp" else "")
        else:
            instructions = f", with {cpp_library.instructions()} instructions" if name == "cpp" else ""
            yield Finding("Kernels", name, "ok", _BACKENDS[name] + instructions)
    reason = flash_attention.unavailable()
    detail = "attention for generation: runs only when requested by name"
    yield Finding("Kernels", "flash", "off" if reason else "ok", reason or detail)
