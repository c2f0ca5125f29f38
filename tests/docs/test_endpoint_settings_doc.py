"""docs/endpoints.md is correct: its configurations are valid, its table lists all settings, its figures follow."""

from __future__ import annotations

import re

import pytest
import yaml
from document import Document
from settings_table import settings

from alignpro.config import TargetEndpointConfig, TrainConfig, validate_config
from alignpro.planning.spending import describe_spending
from alignpro.targets.connection import AskedSoFar

DOCUMENT = Document("endpoints.md")
BLOCKS = [code for _, code in DOCUMENT.blocks("yaml")]


def test_every_setting_is_in_the_table_with_its_default() -> None:
    told = {cells[0]: cells[1] for cells in DOCUMENT.rows("Settings of an endpoint")}
    assert told == dict(settings(TargetEndpointConfig, ()))


def test_the_cost_of_the_example_is_what_a_dry_run_prints() -> None:
    config = validate_config(TrainConfig, yaml.safe_load(BLOCKS[0]))
    ((_, printed),) = DOCUMENT.blocks("text")[:1]
    assert printed.splitlines() == [f"# {line}" for line in describe_spending(config)]


@pytest.mark.parametrize("block", [block for block in BLOCKS[1:] if block.startswith(("target:", "endpoint:"))])
def test_the_recipes_are_valid(block: str) -> None:
    given = yaml.safe_load(block)
    target = given.get("target", given)
    validate_config(TrainConfig, {**yaml.safe_load(BLOCKS[0]), "target": target, "prices": {}, "budget": {}})


def test_every_metric_is_in_the_table() -> None:
    told = {name for cells in DOCUMENT.rows("Metrics of a server") for name in re.findall(r"[\w]+/[\w]+", cells[0])}
    made = {f"endpoint/{name}" for name in AskedSoFar().since(AskedSoFar())}
    assert told == made | {"seconds/target", "target/filtered", "target/overflow", "target/changed"}
