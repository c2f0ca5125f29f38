"""What holds for every document: its links, the languages of its code, and its command lines."""

from __future__ import annotations

import pytest
from document import Document, check_command

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
