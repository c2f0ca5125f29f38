"""docs/kernels.md is true: its code runs, its figures are the code's, and what it names is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from alignpro_kernels import linear_logprob, linear_sample, policy_loss
from alignpro_kernels.backends import BACKENDS, backend_module

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "kernels.md"
TEXT = FILE.read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[int, str]]:
    """The code blocks in a language, each with the line of the document that it begins on."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [(TEXT.count("\n", 0, match.start(1)), match[1]) for match in found]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_python_block_runs_after_those_before_it() -> None:
    namespace: dict[str, Any] = {}
    assert len(blocks("python")) >= 6
    with torch.random.fork_rng():
        for line, code in blocks("python"):
            exec(compile("\n" * line + code, str(FILE), "exec"), namespace)


def test_there_is_no_code_in_a_language_that_is_not_looked_at() -> None:
    assert len(re.findall(r"^```\w+$", TEXT, flags=re.MULTILINE)) == len(blocks("python")) + len(blocks("sh"))


@pytest.mark.parametrize("cells", rows("Floating-point operations"), ids=lambda cells: cells[0])
def test_operations_are_as_many_as_the_table_says(cells: list[str]) -> None:
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


def test_budgets_are_those_of_the_code() -> None:
    table = {cells[0]: cells[1] for cells in rows("Memory")}
    assert set(table) == set(BACKENDS)
    for name in BACKENDS[:-1]:
        budget = backend_module(name)._BUDGET
        expected = list(budget.values()) if isinstance(budget, dict) else [budget]
        assert [int(mib) << 20 for mib in re.findall(r"(\d+) MiB", table[name])] == expected


def test_every_backend_has_a_row() -> None:
    assert [cells[0] for cells in rows("Backends")] == list(BACKENDS)


def test_links_and_folders_are_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    for link in links:
        assert (FILE.parent / link).exists(), link
    for command in "\n".join(code for _, code in blocks("sh")).split():
        assert not command.startswith("tests/") or (ROOT / command).exists(), command


COMMANDS = [line for _, code in blocks("sh") for line in code.splitlines() if "python -m" in line]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_have_the_options_that_are_given(line: str) -> None:
    """They are not run: that takes a compiler, or minutes."""
    module, *arguments = line.split("python -m ")[1].split()
    assert importlib.util.find_spec(module) is not None
    options = [word for word in arguments if word.startswith("--")]
    if options:
        app = importlib.import_module(f"{module}.__main__").app
        described = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
        assert [option for option in options if not re.search(rf"{option}\b", described)] == []
