"""What holds for every document: its links, the languages of its code, and its command lines."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest
from document import ROOT, Document, check_command

WITH_CODE = ("engine.md", "kernels.md")
ALL = (
    *WITH_CODE,
    "data.md",
    "endpoints.md",
    "gpu.md",
    "judging.md",
    "launch.md",
    "rewards.md",
    "serving.md",
    "tasks.md",
    "training.md",
    "walkthrough.md",
    "miniature/README.md",
    "../launch/presets/laboratory/README.md",
    "../launch/presets/real/README.md",
)


@pytest.mark.parametrize("name", [*ALL, "../README.md", "../CONTRIBUTING.md", "../CHANGELOG.md", "../SECURITY.md"])
def test_links_and_folders_exist(name: str) -> None:
    Document(name).check_links()


@pytest.mark.parametrize(
    "file", sorted(chain(ROOT.glob("*.md"), ROOT.glob("docs/**/*.md"))), ids=lambda file: file.name
)
def test_tables_are_whole(file: Path) -> None:
    """Every row stands below a header and a line of dashes, with as many cells; else it is shown as text."""
    lines = re.sub(
        r"^ *```.*?^ *```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    ).splitlines()
    for above, line, below in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        if line.startswith("|") and not above.startswith("|"):
            assert re.fullmatch(r"[|]( *:?-+:? *[|])+", below), f"{line} is no header of a table"
            assert cells(line) == cells(below), f"{line} has not as many cells as the line below"


def cells(row: str) -> int:
    """Count the bars that divide the cells of a table's row; one behind a backslash does not."""
    return re.sub(r"\\[|]", "", row).count("|")


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_blocks_run_in_order(name: str) -> None:
    assert len(Document(name).blocks("python")) >= 6
    Document(name).run()


@pytest.mark.parametrize("name", WITH_CODE)
def test_all_code_is_in_languages_that_are_tested(name: str) -> None:
    Document(name).check_languages()


@pytest.mark.parametrize("line", [line for name in WITH_CODE for line in Document(name).commands])
def test_commands_use_existing_options(line: str) -> None:
    check_command(line)
