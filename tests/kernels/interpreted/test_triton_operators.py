"""The public operators with the Triton backend, interpreted, through the shared code for chunks, masks, LoRA and autograd."""

import pytest
import torch
from torch import Tensor

from alignpro_kernels import LoRA, backends, linear_logprob, linear_sample, policy_loss, triton_head

N, D, D_REF, V = 150, 20, 12, 40


def inputs(*, grad: bool = True) -> dict:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    lora = LoRA(randn(4, D).requires_grad_(grad), randn(V, 4).requires_grad_(grad), 0.1)
    return {
        "hidden": randn(N, D).requires_grad_(grad),
        "weight": randn(V, D).requires_grad_(grad),
        "target": torch.randint(V, (N,), generator=g),
        "bias": randn(V).requires_grad_(grad),
        "lora": lora,
        "temperature": torch.rand(N, generator=g) + 0.5,
        "mask": torch.rand(N, generator=g) < 0.95,
        "ref_hidden": randn(N, D_REF),
        "ref_weight": randn(V, D_REF),
        "ref_bias": randn(V),
        "softcap": 4.0,
    }


def variables(arguments: dict) -> list[Tensor]:
    return [arguments["hidden"], arguments["weight"], arguments["bias"], arguments["lora"].a, arguments["lora"].b]


def coefficients(logprob: Tensor, entropy: Tensor, kl: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quiet = rows % 3 != 0
    return logprob * quiet, quiet * (rows % 5 - 2.0), quiet * 0.1, quiet * -0.2


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_head, "_BUDGET", 0)  # gives the smallest chunk, 128 rows


def test_it_is_one_of_the_backends() -> None:
    assert backends()["triton"] is None


@pytest.mark.parametrize("frozen", [False, True])
def test_policy_loss(frozen: bool) -> None:
    results = {}
    for backend in ("triton", "reference"):
        arguments = inputs()
        if frozen:
            arguments["weight"].requires_grad_(False)
            arguments["bias"].requires_grad_(False)
        out = policy_loss(**arguments, coefficients=coefficients, entropy=True, backend=backend)
        out.loss.backward()
        results[backend] = [*out, *(x.grad for x in variables(arguments))]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_linear_logprob() -> None:
    results = {}
    for backend in ("triton", "reference"):
        arguments = inputs()
        stats = linear_logprob(**arguments, entropy=True, backend=backend)
        weights = torch.linspace(-1, 1, N) * (torch.arange(N) % 4 != 0)
        (weights * (stats.logprob + 0.3 * stats.entropy - 0.5 * stats.kl)).sum().backward()
        results[backend] = [*stats, *(x.grad for x in variables(arguments))]
    for got, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_linear_sample() -> None:
    arguments = {k: v for k, v in inputs(grad=False).items() if not k.startswith(("ref_", "mask", "target"))}
    seeds = torch.arange(N) * 977
    got, expected = (linear_sample(**arguments, seeds=seeds, backend=name) for name in ("triton", "reference"))
    assert torch.equal(got.token, expected.token)
    torch.testing.assert_close(got.logprob, expected.logprob, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=0, atol=1e-5)
