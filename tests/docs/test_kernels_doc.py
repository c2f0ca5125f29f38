"""docs/kernels.md is correct: its code runs, its figures match the code, and everything it names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from document import Document, check_command
from torch.utils.flop_counter import FlopCounterMode

from alignpro_kernels import LoRA, VocabShard, linear_logprob, linear_sample, policy_loss
from alignpro_kernels.backends import BACKENDS, backend_module

DOCUMENT = Document("kernels.md")


def test_the_python_blocks_run_in_order() -> None:
    assert len(DOCUMENT.blocks("python")) >= 6
    DOCUMENT.run()


def test_all_code_is_in_languages_that_are_tested() -> None:
    DOCUMENT.check_languages()


@pytest.mark.parametrize("cells", DOCUMENT.rows("Floating-point operations"), ids=lambda cells: cells[0])
def test_operation_counts_match_the_table(cells: list[str]) -> None:
    call, forward, backward, together = cells[0], *(int(cell or 0) for cell in cells[1:])
    count, width, vocabulary = 6, 5, 40
    hidden = torch.randn(count, width, requires_grad="sample" not in call)
    weight = torch.randn(vocabulary, width, requires_grad="trained" in call)
    target = torch.zeros(count, dtype=torch.int64)
    reference = {}
    if "KL" in call:
        reference = {"ref_hidden": torch.randn(count, width), "ref_weight": torch.randn(vocabulary, width)}

    def loss(logprob, entropy, kl, rows):
        one = torch.ones_like(logprob)
        return logprob, one, None, None if kl is None else one

    with FlopCounterMode(display=False) as flops:
        if "linear_sample" in call:
            linear_sample(hidden, weight, seeds=target, backend="torch")
        elif "policy_loss" in call:
            value = policy_loss(hidden, weight, target, loss, **reference, backend="torch").loss
        else:
            stats = linear_logprob(hidden, weight, target, **reference, backend="torch")
            value = stats.logprob.sum() + (0 if stats.kl is None else stats.kl.sum())
    unit = count * width * vocabulary
    assert flops.get_total_flops() == forward * unit
    with FlopCounterMode(display=False) as flops:
        if "linear_sample" not in call:
            value.backward()
    assert flops.get_total_flops() == backward * unit
    assert together == forward + backward


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("cells", DOCUMENT.rows("A head split over ranks"), ids=lambda cells: cells[0])
def test_communication_volume_matches_the_table(
    cells: list[str], one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, gathered, summed = cells
    count, width, vocabulary, rank = 6, 5, 40, 3
    sent: dict[str, list[int]] = {"all_gather": [], "all_reduce": []}

    def watch(name: str, argument: int) -> None:
        collective = getattr(dist, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            if arguments[argument].is_floating_point():  # integers are only compared among ranks
                sent[name].append(arguments[argument].numel())
            return collective(*arguments, **options)

        monkeypatch.setattr(dist, name, noted)

    watch("all_gather", 1)
    watch("all_reduce", 0)
    hidden, weight = torch.randn(count, width, requires_grad=True), torch.randn(vocabulary, width)
    options: dict[str, Any] = {"vocab_parallel": VocabShard.even(vocabulary), "backend": "torch"}
    if "LoRA" in call:
        options["lora"] = LoRA(torch.randn(rank, width, requires_grad=True), torch.randn(vocabulary, rank), 1.0)
    if "sample" in call:
        linear_sample(hidden, weight, seeds=torch.arange(count), **options)
    else:
        if "KL" in call:
            options["ref_hidden"] = torch.randn(count, width)

        def loss(logprob, entropy, kl, rows):
            return logprob, torch.ones_like(logprob), None, None

        policy_loss(hidden, weight, torch.zeros(count).long(), loss, entropy="entropy" in call, **options)
    assert sum(sent["all_gather"]) == int(gathered) * count and len(sent["all_gather"]) == 1
    assert sum(sent["all_reduce"]) == {"0": 0, "D": width, "D + r": width + rank}[summed] * count


def test_budgets_match_the_code() -> None:
    table = {cells[0]: cells[1] for cells in DOCUMENT.rows("Memory")}
    assert set(table) == set(BACKENDS)
    for name in BACKENDS[:-1]:
        budget = backend_module(name)._BUDGET
        expected = list(budget.values()) if isinstance(budget, dict) else [budget]
        assert [int(mib) << 20 for mib in re.findall(r"(\d+) MiB", table[name])] == expected


def test_every_backend_has_a_row() -> None:
    assert [cells[0] for cells in DOCUMENT.rows("Backends")] == list(BACKENDS)


def test_links_and_folders_exist() -> None:
    DOCUMENT.check_links()


@pytest.mark.parametrize("line", DOCUMENT.commands)
def test_commands_use_existing_options(line: str) -> None:
    check_command(line)
