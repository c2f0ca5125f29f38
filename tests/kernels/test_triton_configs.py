"""The configurations that the Triton kernels are tuned over."""

import pytest
import torch

pytest.importorskip("triton")

from alignpro_kernels import triton_configs


@pytest.mark.skipif(triton_configs.interpreting(), reason="the interpreter has one configuration")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 60, 64, 100, 500, 8192])
@pytest.mark.parametrize("ref_width", [0, 896])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_every_call_has_a_suitable_configuration(
    dtype: torch.dtype, rows: int, ref_width: int, softcap: float | None
) -> None:
    call = {"hidden": torch.empty(1, dtype=dtype), "rows": rows, "softcap": softcap}
    found = triton_configs.prune_logits_configs(triton_configs.LOGITS, call, REF_D=ref_width)
    assert found
    assert all(c.kwargs["BM"] <= max(64, 2 * rows) for c in found)
    assert all(c.kwargs["BN"] % triton_configs.MIN_TILE_WIDTH == 0 for c in found)
    sampling = triton_configs.prune_sample_configs(triton_configs.SAMPLES, call)
    assert sampling
    assert all(c in triton_configs.sample_candidates(dtype) for c in sampling)
    assert all(c.kwargs["BM"] <= max(16, 2 * rows) for c in sampling)
    assert all(c.kwargs["BN"] % triton_configs.MIN_TILE_WIDTH == 0 for c in sampling)


def test_tiles_narrower_than_the_partial_sums_are_not_offered() -> None:
    tables = (
        triton_configs.HALF,
        triton_configs.HALF_WITH_REFERENCE,
        triton_configs.SINGLE,
        triton_configs.SAMPLE,
        triton_configs.SAMPLE_SINGLE,
    )
    for table in tables:
        assert all(c.kwargs["BN"] % 64 == 0 for c in table)
