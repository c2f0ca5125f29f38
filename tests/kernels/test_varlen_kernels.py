"""Calls of flash-attn 2, 3 and 4 and of PyTorch's kernels agree with their signatures and documentation.

The libraries are implemented on the CPU as documented, behind the recorded signatures; where they are installed, their
signatures are compared with the record, and on a GPU their results with float64.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib import metadata
from itertools import accumulate

import documented_kernels
import pytest
import torch
from documented_kernels import LIBRARIES, RECORD, REFERENCE
from torch import Tensor

from alignpro_kernels import flash_attn_packages, varlen_kernels
from alignpro_kernels.merged_attention import ALL, Part, merged_attention
from alignpro_kernels.varlen import ScoreOptions, Varlen, VarlenKernels, unsupported

OWN, QUERIES, KEYS = [7, 40, 33, 9, 64], [73, 64], [7, 9]
"""A prompt of 7 tokens with continuations of 40 and 33, then one of 9 with one of 64."""


def parts(device: str = "cpu") -> list[Part]:
    def varlen(queries: list[int], keys: list[int], causal: bool) -> Varlen:
        bounds = [torch.tensor([0, *accumulate(x)], dtype=torch.int32, device=device) for x in (queries, keys)]
        return Varlen(*bounds, max(queries), max(keys), causal)

    at = torch.tensor([*range(7, 80), *range(89, 153)], device=device)
    of = torch.tensor([*range(7), *range(80, 89)], device=device)
    return [Part(ALL, ALL, varlen(OWN, OWN, True)), Part(at, of, varlen(QUERIES, KEYS, False))]


def results(
    kernels: VarlenKernels, inputs: list[Tensor], softcap: float | None, window: int | None
) -> tuple[Tensor, ...]:
    *leaves, weight = inputs
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = merged_attention(*leaves, parts(str(weight.device)), kernels, ScoreOptions(0.3, softcap, window))
    return (out.detach(), *torch.autograd.grad(out, leaves, weight))


def inputs(dtype: torch.dtype, dim: int = 16, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(OWN), heads, dim).to(device, dtype) for heads in (4, 2, 2, 4)]


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 5)])
@pytest.mark.parametrize("name", LIBRARIES)
def test_calls_are_right_by_the_documentation(
    name: str, softcap: float | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = LIBRARIES[name]
    if softcap is not None and not kernels.has_softcap:
        return
    documented_kernels.install(monkeypatch)
    given = inputs(torch.bfloat16)
    for ours, expected in zip(
        results(kernels, given, softcap, window), results(REFERENCE, given, softcap, window), strict=True
    ):
        # Sums of merged_attention round differently where lse has another layout.
        assert ours.dtype == torch.bfloat16 and (ours - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("name", LIBRARIES)
def test_keys_of_given_lengths_and_single_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documented_kernels.install(monkeypatch)
    q, k, v, _ = inputs(torch.bfloat16)
    bounds, starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 3], [0, 50, 0, 0], [50, 9, 3]))
    varlen = Varlen(bounds, starts, 1, 50, False, lengths)
    options = ScoreOptions(0.3)
    ours = LIBRARIES[name].forward(q[:3], k, v, varlen, options)
    expected = REFERENCE.forward(q[:3], k, v, varlen, options)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_the_reference_computes_the_gradient() -> None:
    given = [x.double()[:12] for x in inputs(torch.float64)]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    varlen = Varlen(bounds, bounds, 7, 7, True)
    *leaves, weight = given
    for options in (ScoreOptions(0.3), ScoreOptions(0.3, 1.5, 3)):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, lse = REFERENCE.forward(*leaves, varlen, options)
        exact = torch.autograd.grad(out, leaves, weight)
        ours = REFERENCE.backward(weight, *leaves, out, lse, varlen, options)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b)


def test_what_is_unsupported_is_said() -> None:
    flash, torch_kernels = LIBRARIES["flash-attn 2"], LIBRARIES["torch"]
    query = torch.zeros(3, 4, 128, dtype=torch.bfloat16)
    assert unsupported(flash, query, 30.0) is None and unsupported(torch_kernels, query, None) is None
    assert unsupported(torch_kernels, query, 30.0) == "it has no soft-cap"
    assert "takes bfloat16 and float16, and the input is torch.float32" in (
        unsupported(flash, query.float(), None) or ""
    )
    for dim in (20, 264):
        reason = unsupported(flash, query.new_zeros(3, 4, dim), None)
        assert reason == f"it needs a head dimension that is a multiple of 8, at most 256, and this one is {dim}"


def test_a_library_is_found_by_its_metadata_and_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn 4 alone makes ``import flash_attn`` work; flash-attn 2 must not be taken for installed."""
    installed = {"flash-attn-4": "4.0.0b36"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    capability = (9, 0)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def available() -> list[str]:
        flash_attn_packages._installed.cache_clear()
        varlen_kernels.why_unavailable.cache_clear()
        return [each.name for each in varlen_kernels.available()]

    assert available() == ["flash-attn 4 (4.0.0b36)", "torch"]
    assert LIBRARIES["flash-attn 2"].name == "flash-attn 2"
    installed |= {"flash-attn": "2.8.3", "flash_attn_3": "3.0.0"}
    assert available() == ["flash-attn 4 (4.0.0b36)", "flash-attn 3 (3.0.0)", "flash-attn 2 (2.8.3)", "torch"]
    capability = (10, 0)
    assert LIBRARIES["flash-attn 3"].unavailable() == "the GPU has compute capability 10.0: it needs 9.0, below 10.0"
    capability = (7, 5)
    assert not available()
    assert LIBRARIES["flash-attn 2"].unavailable() == "the GPU has compute capability 7.5: it needs 8.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LIBRARIES["torch"].unavailable() == "there is no CUDA device"


@pytest.fixture(autouse=True)
def found_out_anew() -> Iterator[None]:
    yield
    flash_attn_packages._installed.cache_clear()
    varlen_kernels.why_unavailable.cache_clear()


@pytest.mark.parametrize(("package", "function"), [(p, f) for p in RECORD for f in RECORD[p]["functions"]])
def test_the_installed_package_has_the_recorded_parameters(package: str, function: str) -> None:
    if LIBRARIES[package].unavailable() is not None:
        pytest.skip(str(LIBRARIES[package].unavailable()))
    found = getattr(importlib.import_module(RECORD[package]["module"]), function)
    parameters = inspect.signature(getattr(found, "_init_fn", found)).parameters  # of a custom operator
    missing = set(RECORD[package]["functions"][function]) - set(parameters)
    assert not missing, f"{LIBRARIES[package].name} has no {missing}, which {RECORD[package]['version']} has"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("softcap", "window", "dim"), [(None, None, 128), (20.0, None, 64), (None, 5, 64)])
@pytest.mark.parametrize("name", LIBRARIES)
def test_on_a_gpu(name: str, softcap: float | None, window: int | None, dim: int) -> None:
    """The error against float64 is at most 1.5 times that of the same formulas with plain products in bfloat16."""
    kernels = LIBRARIES[name]
    if (reason := kernels.unavailable()) is not None:
        pytest.skip(reason)
    if softcap is not None and not kernels.has_softcap:
        pytest.skip("it has no soft-cap")
    given = inputs(torch.bfloat16, dim, "cuda")
    ours = results(kernels, given, softcap, window)
    exact = results(REFERENCE, [x.double() for x in given], softcap, window)
    plain = plain_bfloat16(given, softcap, window)
    for got, truth, other in zip(ours, exact, plain, strict=True):
        assert (got - truth).norm() <= 1.5 * (other - truth).norm() + 1e-6


def plain_bfloat16(given: list[Tensor], softcap: float | None, window: int | None) -> tuple[Tensor, ...]:
    """One dense attention with its probabilities in bfloat16, as models compute it eagerly."""
    *leaves, weight = given
    leaves = [x.clone().requires_grad_() for x in leaves]
    q, k, v = (x.repeat_interleave(4 // x.shape[1], dim=1).transpose(0, 1) for x in leaves)
    z = (q @ k.mT) * 0.3
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    place = torch.cat([torch.arange(n) for n in OWN]).to(z.device)
    segment = torch.arange(len(OWN)).repeat_interleave(torch.tensor(OWN)).to(z.device)
    parent = torch.tensor([-1, 0, 0, -1, 3], device=z.device)[segment]
    distance = place[:, None] - place
    own = (segment[:, None] == segment) & (distance >= 0) & (distance < (window or sum(OWN)))
    seen = own | (parent[:, None] == segment)
    p = z.masked_fill(~seen, -torch.inf).float().softmax(-1).to(z.dtype)
    out = (p @ v).transpose(0, 1)
    return (out.detach(), *torch.autograd.grad(out, leaves, weight))
