"""docs/endpoints.md is correct: its commands exist, and its states and its error are the code's."""

from __future__ import annotations

import re
import shlex
from decimal import Decimal

import pytest
import yaml
from document import Document
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import EndpointConfig, SpendingConfig, validate_config
from alignpro.endpoints.budget import Budget, Charge
from alignpro.endpoints.ledger_schema import FILE_NAME, TABLES
from alignpro.errors import BudgetError

DOCUMENT = Document("endpoints.md")


def test_its_commands_exist_with_their_options() -> None:
    commands = get_command(app).commands["ledger"].commands  # type: ignore[attr-defined]
    lines = [line for _, code in DOCUMENT.blocks("sh") for line in code.splitlines() if "alignpro ledger" in line]
    assert {shlex.split(line)[2] for line in lines} == set(commands)
    for line in lines:
        _, _, name, *arguments = shlex.split(line, comments=True)
        commands[name].make_context(name, list(arguments))


def test_its_states_are_those_of_the_file() -> None:
    (states,) = re.findall(r"state IN \(([^)]*)\)\)", "".join(TABLES))
    assert [row[0] for row in DOCUMENT.rows("Ledger")] == re.findall(r"\w+", states)
    assert f"`{FILE_NAME}` in the run directory" in DOCUMENT.text


def test_its_budget_is_valid_and_its_error_is_the_budgets() -> None:
    (config,) = (
        validate_config(SpendingConfig, yaml.safe_load(code))
        for _, code in DOCUMENT.blocks("yaml")
        if "\nbudget:" in code
    )
    assert config.budget.usd == Decimal(5)
    with pytest.raises(BudgetError) as refused:
        Budget(config.budget, Charge(9, 9, 4_998 * 10**9)).reserve(Charge(1, 1, 21 * 10**8))
    assert f"    error: {refused.value}\n" in DOCUMENT.text
    assert f"`prompt_overhead` ({EndpointConfig.model_fields['prompt_overhead'].default})" in DOCUMENT.text
