"""The program of each of the two ranks of test_vocab_parallel.py: runs all cases and writes the results to a file.

TRITON_INTERPRET=1 python vocab_parallel_ranks.py DIRECTORY RANK
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from head_problems import Problem, run, slice_of
from torch.autograd import gradcheck
from vocab_parallel_cases import (
    ADVERSARIAL,
    ADVERSARIAL_SIZES,
    BACKENDS,
    CASES,
    EXACT,
    ROUNDED,
    SAMPLING,
    SMALL,
    Case,
    adversarial,
    sampling,
)

from alignpro_kernels import LoRA, VocabShard, backends, linear_logprob, linear_sample, policy_loss
from alignpro_kernels.backends import backend_module


def call(case: Case) -> dict[str, torch.Tensor]:
    shard = VocabShard(case.sizes)
    if case.most_rows is None:
        return run(case.problem, case.operator, case.backend, case.dtype, shard=shard).values
    module: Any = backend_module(case.backend)
    whole, most = module.rows_in_flight, case.most_rows[shard.rank]
    module.rows_in_flight = lambda head, dtype: most
    try:
        return run(case.problem, case.operator, case.backend, case.dtype, shard=shard).values
    finally:
        module.rows_in_flight = whole


def everything(logprob, entropy, kl, rows):
    one = torch.ones_like(logprob)
    return logprob + entropy + kl, one, one, one


def call_adversarial(name: str, backend: str) -> list[torch.Tensor]:
    shard = VocabShard(ADVERSARIAL_SIZES)
    arguments = slice_of(adversarial(name, torch.float32), shard)
    out = policy_loss(coefficients=everything, vocab_parallel=shard, backend=backend, **arguments)
    return [*out[1:], *torch.autograd.grad(out.loss, [arguments["hidden"], arguments["weight"]])]


def call_sample(name: str, backend: str) -> list[torch.Tensor]:
    shard = VocabShard(ADVERSARIAL_SIZES)
    arguments = sampling(name, EXACT[backend])
    if "lora" in arguments:
        arguments["lora"] = LoRA(*arguments["lora"], 0.5)
    return list(linear_sample(vocab_parallel=shard, backend=backend, **slice_of(arguments, shard)))


def check_gradients(backend: str) -> bool:
    """Check by finite differences in the inputs that all ranks share; each rank perturbs them equally."""
    shard = VocabShard((4, 5))
    problem = Problem(
        rows=4, width=3, vocabulary=9, bias=True, rank=2, reference="shared", softcap=3.0, temperatures=True
    )
    a = slice_of(problem.tensors(torch.float64), shard)
    hidden, lora = a.pop("hidden"), a.pop("lora")

    def given(lora_a):
        return {**a, "lora": lora._replace(a=lora_a), "vocab_parallel": shard, "backend": backend}

    def stats(hidden, lora_a):
        return linear_logprob(hidden, **given(lora_a))

    def loss(hidden, lora_a):
        def callback(logprob, entropy, kl, rows):
            return logprob.square() + entropy * kl, 2 * logprob, kl, entropy

        return policy_loss(hidden, coefficients=callback, **given(lora_a)).loss

    return gradcheck(stats, (hidden, lora.a)) and gradcheck(loss, (hidden, lora.a))


def bad_row(backend: str) -> list[torch.Tensor]:
    shard = VocabShard.even(SMALL.vocabulary)
    arguments = slice_of(SMALL.tensors(torch.float32), shard)
    hidden = arguments.pop("hidden").detach().clone()
    hidden[2, 5] = torch.nan
    hidden.requires_grad_()
    stats = linear_logprob(hidden, vocab_parallel=shard, backend=backend, **arguments)
    return [stats.logprob, stats.entropy, *torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), hidden)]


def mistakes(rank: int) -> dict[str, str]:
    """Return the error of each mistake."""
    shard = VocabShard.even(SMALL.vocabulary)
    good = slice_of(SMALL.tensors(torch.float32), shard)
    target = good["target"]

    def one(logprob, entropy, kl, rows):
        return logprob, torch.ones_like(logprob), None, None

    def other(logprob, entropy, kl, rows):  # on rank 0 no row is active
        return logprob, torch.full_like(logprob, float(rank)), None, None

    def backward() -> None:
        out = linear_logprob(**good, vocab_parallel=shard)
        (out.logprob * (1.0 + rank)).sum().backward()

    def lacking(**changes: Any) -> Callable[[], Any]:
        return lambda: linear_logprob(**{**good, **changes}, vocab_parallel=shard)

    calls = {
        "rows": lacking(hidden=good["hidden"][: 11 - rank], target=target[: 11 - rank]),
        "targets": lacking(target=target.roll(rank)),
        "temperature": lacking(temperature=1.0 + rank),
        "operator": lacking() if rank else lambda: policy_loss(**good, coefficients=one, vocab_parallel=shard),
        "coefficients": lambda: policy_loss(**good, coefficients=other, vocab_parallel=shard),
        "upstream": backward,
        "one rank's weight": lacking(weight=good["weight"][: len(good["weight"]) - rank]),
        "target of no slice": lacking(target=target + SMALL.vocabulary),
        "empty slice": lambda: VocabShard.even(1),
        "sizes": lambda: VocabShard((157,)),
        "another group": lambda: VocabShard((157,), dist.new_group([0])),
        "sizes by rank": lambda: linear_logprob(
            **slice_of(SMALL.tensors(torch.float32), shard),
            vocab_parallel=VocabShard((79, 78) if rank == 0 else (80, 78)),
        ),
    }
    answers = {}
    for name, make in calls.items():
        try:
            make()
            answers[name] = "no error"
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    return answers


def main(directory: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    here = [name for name in BACKENDS if backends()[name] is None]
    calls: dict[str, Callable[[], Any]] = {}
    for name, case in {**CASES, **ROUNDED}.items():
        calls[name] = lambda case=case: call(case)
    for backend in BACKENDS:
        for name in ADVERSARIAL:
            calls[f"{backend} {name}"] = lambda name=name, backend=backend: call_adversarial(name, backend)
        for name in SAMPLING:
            calls[f"{backend} sample {name}"] = lambda name=name, backend=backend: call_sample(name, backend)
        calls[f"{backend} bad row"] = lambda backend=backend: bad_row(backend)
    for backend in ("reference", "torch"):
        calls[f"{backend} gradcheck"] = lambda backend=backend: check_gradients(backend)
    results = {name: make() for name, make in calls.items() if name.split()[0] in here}
    again = {name: call(case) for name, case in CASES.items() if "everything" in name and case.backend in here}
    gathered = VocabShard.gather(torch.empty(3 + rank, 1))
    torch.save(
        {
            "backends": here,
            "results": results,
            "again": again,
            "mistakes": mistakes(rank),
            "gathered": (gathered.sizes, gathered.start, gathered.size, gathered.vocabulary),
        },
        directory / f"{rank}.pt",
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
