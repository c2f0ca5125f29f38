"""docs/memory.md is correct: its table has all keys with their defaults, and its configurations and template are some."""

from __future__ import annotations

import shlex
from typing import Any

import yaml
from document import Document
from settings_table import settings
from typer.main import get_command

from alignpro.cli import app
from alignpro.config import EvalConfig, ExperimentConfig, MemoryConfig, TrainConfig, validate_config
from alignpro.experiments.cells import cells
from alignpro.prompting.memory_template import MemoryTemplate, PastRewrite

DOCUMENT = Document("memory.md")


def test_its_links_resolve() -> None:
    DOCUMENT.check_links()


def test_its_table_has_every_key_with_its_default() -> None:
    lines = [line for line in DOCUMENT.text.splitlines() if line.startswith("| `")]
    told = {cells[0].strip("` "): cells[1].strip() for cells in (line.strip("|").split("|") for line in lines)}
    assert told == dict(settings(MemoryConfig, elsewhere=()))


def test_its_commands_exist_with_their_options() -> None:
    (block,) = (block for _, block in DOCUMENT.blocks("sh"))
    for line in block.splitlines():
        name, *arguments = shlex.split(line, comments=True)[1:]
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_its_example_is_what_the_built_in_template_writes() -> None:
    rows = [
        PastRewrite("how do i boil rice", "Explain in three numbered steps how to boil rice.", 0.91, 1),
        PastRewrite("boil an egg for how long", "Eggs.", 0.12, 1),
    ]
    written = MemoryTemplate.read("contrast").render("(the prompter's instruction", rows[:1], rows[1:])
    assert "".join(f"    {line}\n" if line else "\n" for line in written.splitlines()).rstrip() in DOCUMENT.text
    ((_, block),) = DOCUMENT.blocks("jinja")
    assert MemoryTemplate(block, "short").render("z", rows[:1], []).endswith("how to boil rice. (0.91)\nz")


def test_its_rows_are_cells_of_an_experiment() -> None:
    """The memory is on in one training and off in the other, and the dial shows it to the prompter before training."""
    given: dict[str, Any] = yaml.safe_load(Document("experiments.md").blocks("yaml")[0][1])
    first, added = (yaml.safe_load(block) for _, block in DOCUMENT.blocks("yaml"))
    given["methods"] |= added["methods"]
    of = {cell.method: cell for cell in cells(validate_config(ExperimentConfig, given)) if cell.seed == 0}
    trainings = {name: of[name].jobs[0].config for name in ("align_pro", "align_pro_memory")}
    memories = [each.memory for each in trainings.values() if isinstance(each, TrainConfig)]
    assert memories == [None, MemoryConfig.model_validate(first["memory"])]
    ((job,),) = (of["in_context"].jobs,)
    assert isinstance(job.config, EvalConfig) and job.config.arms == ["dial_0"]
    assert job.config.prompter is not None
    assert job.config.prompter.path == f"{of['align_pro_memory'].directory / 'run' / 'model'}"
