"""docs/experiments.md is correct: its configuration is one, with the cells that it describes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from document import ROOT, Document
from settings_table import settings
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import ExperimentConfig, SweepConfig, TrainConfig, load_config, validate_config
from alignpro.config.sweep import SweepSection
from alignpro.experiments.cells import cells
from alignpro.experiments.points import points_of
from alignpro.planning.compute import describe_compute

DOCUMENT = Document("experiments.md")


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


def test_its_configuration_has_a_cell_of_each_method() -> None:
    (_, block), _ = DOCUMENT.blocks("yaml")
    config = validate_config(ExperimentConfig, yaml.safe_load(block))
    plan = cells(config)
    assert len(plan) == 1 + 3 * 8
    names = [cell.directory.relative_to(config.out) for cell in plan if cell.seed == 0]
    assert names[0] == Path("priors/small") and Path("cells/house_style/small/align_pro/small/seed_0") in names
    assert Path("cells/house_style/small/instruction/one_sentence/seed_0") in names
    assert [job.file.name for job in plan[-1].jobs] == ["rlhf.yaml", "eval.yaml"]


def test_its_commands_exist_with_their_options() -> None:
    lines = [line for _, block in DOCUMENT.blocks("sh") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["experiment"] * 3 + ["sweep"] * 2
    for line in lines:
        name = line.split()[1]
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        command.make_context(name, shlex.split(line, comments=True)[2:])


def test_its_sweep_has_the_points_and_settings_that_it_tells(tmp_path: Path) -> None:
    files = []
    for i, (_, block) in enumerate(DOCUMENT.blocks("yaml")):
        files.append(str(tmp_path / f"{i}.yaml"))
        Path(files[-1]).write_text(block)
    config = load_config(SweepConfig, files)
    points = {name: len(each) for name, each in points_of(config).items()}
    assert points == {"gibbs": 4, "align_pro": 12, "grpo": 12, "rlhf": 4}
    table = dict(re.findall(r"^\| `(sweep\.\w+)` \| (\w*\.?\w*) \|", DOCUMENT.text, re.MULTILINE))
    assert table == dict(settings(SweepSection, (), "sweep.")) | {"sweep.methods": "all"}


def test_the_settings_of_an_experiment_are_those_of_its_configuration() -> None:
    elsewhere = ("prompting", "rewrite.", "respond.", "engine.", "spending.")
    rows = DOCUMENT.rows("Settings of an experiment")
    assert {key: default for key, default, _ in rows} == dict(settings(ExperimentConfig, elsewhere))


def test_the_arithmetic_of_the_larger_pair_is_that_of_the_plan() -> None:
    config = load_config(TrainConfig, [str(ROOT / "launch" / "sizing" / "pair.yaml")])
    config = config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"path": str(ROOT / config.policy.path)}),
            "target": config.target_model.model_copy(update={"path": str(ROOT / config.target_model.path)}),
            "reward": config.reward.model_copy(update={"components": []}),
        }
    )
    (line,) = describe_compute(config)
    assert "344 PFLOP in 100 steps: 0.24 h" in line
    assert "344 PFLOP" in DOCUMENT.text and "0.24 hours" in DOCUMENT.text
