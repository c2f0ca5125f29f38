"""Resources of the compiled kernels, compared with tests/kernels/triton_resources.json. No GPU is needed.

After an intended change: ``python tests/kernels/triton_resources.py --write tests/kernels/triton_resources.json``.
"""

import json
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from alignpro_kernels import triton_support  # noqa: E402

if triton_support.interpreting():
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton_resources import TARGETS, measure, variants  # noqa: E402

RECORD = json.loads((Path(__file__).parent / "triton_resources.json").read_text())
BUDGET = RECORD["kernels"]
VARIANTS = {variant.name: variant for variant in variants()}
ATTENTION = ("attention bf16 D128 128x64 w8 s3", "attention bf16 D96 softcap window 128x32 w8 s3")
# One configuration of each kernel is compiled in every run; the others take minutes.
QUICK = [
    ("logits bf16 128x256x64 w8 s3", "sm_90"),
    ("logits bf16 shared reference 128x128x64 w8 s3", "sm_90"),
    ("logits bf16 shared reference 128x128x64 w8 s3", "gfx942"),
    ("sample bf16 16x128x128 w4 s4", "sm_90"),
    ("sample fp32 128x64x32 w8 s3", "sm_80"),
    ("gradient bf16 alpha eta kappa active softcap bias", "sm_90"),
    ("gradient bf16 alpha eta kappa active softcap bias", "gfx942"),
    ("accumulate bf16", "gfx942"),
    ("statistics", "sm_90"),
    ("choice", "sm_90"),
    ("merge", "sm_90"),
    *((name, target) for name in ATTENTION for target in ("sm_80", "sm_90", "gfx942")),
    ("combine", "sm_90"),
]


def check(name: str, target: str) -> None:
    found, budget = measure(VARIANTS[name], target), BUDGET[name][target]
    if _version(triton.__version__) != _version(RECORD["triton"]):
        pytest.skip(f"it compiles, but the record is of Triton {RECORD['triton']}, and this is {triton.__version__}")
    assert found.spills <= budget["spills"], f"{name} spills {found.spills} bytes on {target}"
    assert found.shared <= budget["shared"], f"{name} takes {found.shared} bytes of shared memory on {target}"


def _version(text: str) -> list[str]:
    return re.findall(r"\d+", text)[:2]


@pytest.mark.parametrize(("name", "target"), QUICK)
def test_one_configuration_of_each(name: str, target: str) -> None:
    check(name, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_configuration(name: str, target: str) -> None:
    check(name, target)


def test_the_record_is_complete() -> None:
    assert set(BUDGET) == set(VARIANTS)
    assert all(set(BUDGET[name]) == set(TARGETS) for name in BUDGET)


def test_no_kernel_but_the_largest_products_spills() -> None:
    """The largest ones spill addresses and sums outside the loop over D. Hundreds of bytes would be a regression."""
    for name, targets in BUDGET.items():
        for target, resources in targets.items():
            most = 256 if name.startswith("logits bf16") else 128 if name.startswith("sample") else 64
            assert resources["spills"] <= most, f"{name} on {target}"


def test_every_configuration_fits_its_device() -> None:
    """The limit of shared memory per program is 163 KiB on an A100, 227 on an H100 and B200, 64 on an MI300."""
    most = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
    for name, targets in BUDGET.items():
        for target, resources in targets.items():
            assert resources["shared"] <= most[target], f"{name} on {target}"
