"""docs/experiments.md is correct: its configuration is one, with the cells that it describes."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml
from document import Document
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import ExperimentConfig, validate_config
from alignpro.experiments.cells import cells

DOCUMENT = Document("experiments.md")


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


def test_its_configuration_has_a_cell_of_each_method() -> None:
    ((_, block),) = DOCUMENT.blocks("yaml")
    config = validate_config(ExperimentConfig, yaml.safe_load(block))
    plan = cells(config)
    assert len(plan) == 1 + 3 * 7
    names = [cell.directory.relative_to(config.out) for cell in plan if cell.seed == 0]
    assert names[0] == Path("priors/small") and Path("cells/house_style/small/align_pro/small/seed_0") in names
    assert Path("cells/house_style/small/instruction/one_sentence/seed_0") in names
    assert [job.file.name for job in plan[-1].jobs] == ["rlhf.yaml", "eval.yaml"]


def test_its_commands_exist_with_their_options() -> None:
    lines = [line for _, block in DOCUMENT.blocks("sh") for line in block.splitlines()]
    assert len(lines) == 3
    command = get_command(app).commands["experiment"]  # type: ignore[attr-defined]
    for line in lines:
        command.make_context("experiment", shlex.split(line, comments=True)[2:])
