"""A head that is sharded over two ranks gives the results of the whole head. One launch runs all cases over gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from head_problems import Result, plain_pytorch, run
from torch import Tensor
from vocab_parallel_cases import (
    ADVERSARIAL,
    BACKENDS,
    CASES,
    EXACT,
    OPERATORS,
    ROUNDED,
    SAMPLING,
    SMALL,
    TOLERANCE,
    Case,
    adversarial,
    sampling,
)

from alignpro_kernels import LoRA, VocabShard, linear_logprob, linear_sample, policy_loss

SLICED = ("d weight", "d bias", "d lora.b")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run all cases on two ranks; return each rank's results."""
    directory = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("vocab_parallel_ranks.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(directory), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output[-3000:] for output in outputs)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


def results(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    """Return a case's results on both ranks; skips if its backend does not run here."""
    backend = name.split()[0]
    if backend not in ranks[0]["backends"]:
        pytest.skip(f"backend {backend} does not run here")
    return [rank["results"][name] for rank in ranks]


def joined(parts: list[dict[str, Tensor]]) -> Result:
    """Join both ranks' results. Results that are not sharded must be bit-identical on the ranks."""
    values = {}
    for name in parts[0]:
        if name in SLICED:
            values[name] = torch.cat([part[name] for part in parts])
        else:
            assert torch.equal(parts[0][name], parts[1][name]), name
            values[name] = parts[0][name]
    return Result(values)


def exact(case: Case) -> Result:
    return run(case.problem, case.operator, "reference", torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_two_slices_give_the_results_of_the_whole_head(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    errors = joined(results(ranks, name)).errors(exact(case))
    assert max(errors.values(), default=0.0) < TOLERANCE[case.dtype], errors


@pytest.mark.parametrize("name", ROUNDED)
def test_errors_are_no_larger_than_plain_pytorchs(ranks: list[dict[str, Any]], name: str) -> None:
    case = ROUNDED[name]
    plain = plain_pytorch(case.problem, case.dtype).errors(exact(case))
    for value, error in joined(results(ranks, name)).errors(exact(case)).items():
        assert error <= 1.5 * plain[value] + 1e-6, (value, error, plain[value])


def everything(logprob, entropy, kl, rows):
    one = torch.ones_like(logprob)
    return logprob + entropy + kl, one, one, one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_rows(ranks: list[dict[str, Any]], backend: str, case: str) -> None:
    first, second = results(ranks, f"{backend} {case}")

    def whole(dtype: torch.dtype) -> list[Tensor]:
        arguments = adversarial(case, dtype)
        out = policy_loss(coefficients=everything, backend="reference", **arguments)
        return [*out[1:], *torch.autograd.grad(out.loss, [arguments["hidden"], arguments["weight"]])]

    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
    ours = [*first[:4], torch.cat([first[4], second[4]])]
    for x, p, e in zip(ours, whole(torch.float32), whole(torch.float64), strict=True):
        assert x.isfinite().all()
        # The rounding of float32 logits of 1e4 is part of the plain formula's error too. The KL, here in the tens, is
        # rounded once more in every slice.
        allowed = 1.5 * (p - e).abs().max() + 4e-6 * e.abs().max().clamp_min(1.0)
        assert (x - e).abs().max() <= allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SAMPLING)
def test_samples_equal_those_of_the_whole_head(ranks: list[dict[str, Any]], backend: str, case: str) -> None:
    first, second = results(ranks, f"{backend} sample {case}")
    arguments = sampling(case, EXACT[backend])
    if "lora" in arguments:
        arguments["lora"] = LoRA(*arguments["lora"], 0.5)
    whole = linear_sample(backend="reference", **arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], whole.token)
    assert len(set(((first[0] >= 130) + 0).tolist())) == (2 if "ruled out" not in case else 1)
    for got, expected in zip(first[1:], whole[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_does_not_affect_others(ranks: list[dict[str, Any]], backend: str) -> None:
    others = [row for row in range(SMALL.rows) if row != 2]
    arguments = SMALL.tensors(torch.float64)
    stats = linear_logprob(backend="reference", **arguments)
    gradient = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), arguments["hidden"])
    for values in results(ranks, f"{backend} bad row"):
        for bad, clean in zip(values, [stats.logprob, stats.entropy, *gradient], strict=True):
            assert bad[2].isnan().all()
            torch.testing.assert_close(bad[others].double(), clean[others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_agree_with_finite_differences(ranks: list[dict[str, Any]], backend: str) -> None:
    assert results(ranks, f"{backend} gradcheck") == [True, True]


def test_the_same_inputs_give_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["again"]) == len(OPERATORS) * len(rank["backends"])
        for name, values in rank["again"].items():
            for value, again in values.items():
                assert torch.equal(rank["results"][name][value], again), (name, value)


def test_disagreements_of_the_ranks_are_named_on_both(ranks: list[dict[str, Any]]) -> None:
    for name, said in {
        "rows": "disagree on the number of rows (11, 10)",
        "targets": "disagree on target:",
        "temperature": "disagree on temperature:",
        "operator": "disagree on the operator:",
        "sizes by rank": "disagree on the sizes of the slices:",
        "coefficients": "disagree on what coefficients returned:",
        "upstream": "disagree on d logprob:",
        "empty slice": "rank 1 has 0 rows of the head",
        "sizes": "1 sizes for a group of 2 ranks",
    }.items():
        for rank in ranks:
            assert rank["mistakes"][name].startswith("ValueError: ") and said in rank["mistakes"][name], name


def test_an_error_on_one_rank_does_not_hang_the_other(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["mistakes"] for rank in ranks)
    assert "linear_logprob: rank 1 of vocab_parallel raised an error" in first["one rank's weight"]
    assert "weight has 77 rows, but vocab_parallel expects 78 on rank 1" in second["one rank's weight"]
    assert first["target of no slice"] == second["target of no slice"]
    assert "outside the vocabulary of 157" in first["target of no slice"]
    assert first["another group"] == "no error" and "not in the group" in second["another group"]


def test_ranks_are_asked_for_their_slices(ranks: list[dict[str, Any]]) -> None:
    assert [rank["gathered"] for rank in ranks] == [((3, 4), 0, 3, 7), ((3, 4), 3, 4, 7)]


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        VocabShard.even(157)
