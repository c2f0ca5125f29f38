"""docs/mixtures.md is correct: its commands and keys exist, and its method is one of an experiment."""

from __future__ import annotations

import shlex

import yaml
from document import Document
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import ExperimentConfig, validate_config

DOCUMENT = Document("mixtures.md")


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


def test_its_commands_exist_with_their_options() -> None:
    lines = [line for _, block in DOCUMENT.blocks("sh") for line in block.splitlines()]
    assert len(lines) == 9
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)[1:]
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_its_methods_are_some_of_an_experiment() -> None:
    dial, trained = (yaml.safe_load(block) for _, block in DOCUMENT.blocks("yaml"))
    config = {
        "out": "runs/experiment",
        "prompters": {"small": {"policy": {"path": "small"}}},
        "targets": {"small": {"path": "small"}},
        "tasks": {
            "one": {"data": {"source": "x"}, "reward": {"components": [{"kind": "function", "function": "a:b"}]}}
        },
        "methods": {"align_pro": {"kind": "train"}, **dial, **trained},
    }
    validate_config(ExperimentConfig, config)
