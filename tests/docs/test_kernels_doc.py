"""docs/kernels.md is correct: its figures match the code, and everything it names exists."""

from __future__ import annotations

import re

import pytest
import torch
from document import Document, recorded
from torch.utils.flop_counter import FlopCounterMode

from alignpro_kernels import linear_logprob, linear_sample, policy_loss
from alignpro_kernels.backends import BACKENDS, backend_module

DOCUMENT = Document("kernels.md")


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


def test_budgets_match_the_code() -> None:
    table = {cells[0]: cells[1] for cells in DOCUMENT.rows("Memory")}
    assert set(table) == set(BACKENDS)
    for name in BACKENDS[:-1]:
        budget = backend_module(name)._BUDGET
        expected = list(budget.values()) if isinstance(budget, dict) else [budget]
        assert [int(mib) << 20 for mib in re.findall(r"(\d+) MiB", table[name])] == expected


def test_every_backend_has_a_row() -> None:
    assert [cells[0] for cells in DOCUMENT.rows("Backends")] == list(BACKENDS)


def test_the_time_of_samples_over_the_floor_is_the_recorded_one() -> None:
    ratios = [
        entrant["ratio_to_floor"]
        for result in recorded("kernels")["results"]
        for entrant in result["entrants"]
        if result["case"]["operator"] == "linear_sample" and entrant["entrant"] == "ours-cpp"
    ]
    assert f"`linear_sample` by `cpp` took {min(ratios):.2f} to {max(ratios):.2f} of it" in DOCUMENT.text
