"""docs/endpoints.md is correct: its commands exist, and its states and its error are the code's."""

from __future__ import annotations

import re
import shlex
from decimal import Decimal

import pytest
import yaml
from document import Document, recorded
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import EndpointConfig, SpendingConfig, validate_config
from alignpro.endpoints.budget import Budget, Charge
from alignpro.endpoints.ledger_schema import FILE_NAME, TABLES
from alignpro.errors import BudgetError

DOCUMENT = Document("endpoints.md")
TEXT = " ".join(DOCUMENT.text.split())
"""Without line breaks."""


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
        if code.startswith("prices:")
    )
    assert config.budget.usd == Decimal(5)
    with pytest.raises(BudgetError) as refused:
        Budget(config.budget, Charge(9, 9, 4_998 * 10**9)).reserve(Charge(1, 1, 21 * 10**8))
    assert f"    error: {refused.value}\n" in DOCUMENT.text
    assert f"`prompt_overhead` ({EndpointConfig.model_fields['prompt_overhead'].default})" in DOCUMENT.text


def test_the_clients_figures_are_the_recorded_ones() -> None:
    without, recorded_too = recorded("endpoints")["throughput"]
    assert [without["ledger"], recorded_too["ledger"]] == [False, True]
    for each in (without, recorded_too):
        assert each["answers"] == 100_000
        assert f"{each['answers_per_s']:,.0f} answers a second" in TEXT
        assert f"{each['mib_growth']:,.0f} MiB" in TEXT


def test_the_times_of_rollouts_and_steps_are_the_recorded_ones() -> None:
    document = recorded("endpoints")
    for row in document["rollouts"]:
        assert f"{row['median_s']:.2f} s" in TEXT
        assert row["median_s"] <= row["goal_s"]
    for row in document["steps"] + document["judged_steps"]:
        assert row["latency"] == 0.3 and f"{row['step_s']:.2f} s" in TEXT
    load = max(part["load_average"] for part in document["parts"].values())
    assert f"up to {load:.1f}" in TEXT
    assert {part["scheduler"] for part in document["parts"].values()} == {"SCHED_FIFO 10"} and "`chrt -f 10`" in TEXT


def test_the_cost_of_the_run_that_is_measured_is_the_recorded_one() -> None:
    rows = recorded("server_training")["training"]["server"]
    requests, tokens = (int(sum(row[f"endpoint/{name}"] for row in rows)) for name in ("requests", "tokens"))
    assert f"made {requests} requests of at most 208 tokens" in TEXT
    assert f"{requests * 208:,} tokens by the formula. It took {tokens:,}." in TEXT
    assert f"${tokens * 0.60 / 1e6:.4f} at the very most" in TEXT


def test_the_figures_of_training_against_a_server_are_the_recorded_ones() -> None:
    document = recorded("server_training")
    for name in ("untrained", "in process", "server"):
        assert shown(document["rewards"][name]) in TEXT
    assert shown(document["difference"]) in TEXT
    assert document["difference"]["low"] <= 0 <= document["difference"]["high"]  # "within its interval"
    steps = {len(rows) for rows in document["training"].values()}
    assert f"{steps.pop()} steps" in TEXT and not steps
    assert f"vLLM {document['server']}" in TEXT
    assert f"{document['heldout_prompts']} held-out prompts" in TEXT


def shown(estimate: dict[str, float]) -> str:
    """A mean with its interval."""
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]".replace("-", "−")
