"""A parsed Markdown document of the project, for tests that check its code, tables and links."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]


def recorded(name: str) -> Any:
    """Return the recorded results of a benchmark on a CPU."""
    return json.loads((ROOT / "benchmarks" / "results" / "cpu" / f"{name}.json").read_text())


class Document:
    """A file below ``docs``."""

    def __init__(self, name: str) -> None:
        self.file = ROOT / "docs" / name
        self.text = self.file.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[tuple[int, str]]:
        """Return the code blocks in a language, each with the number of lines before it in the document."""
        found = re.finditer(rf"^```{language}\n(.*?)^```$", self.text, flags=re.MULTILINE | re.DOTALL)
        return [(self.text.count("\n", 0, match.start(1)), match[1]) for match in found]

    def rows(self, heading: str) -> list[list[str]]:
        """Return the cells of the table under a heading, without its header."""
        section = self.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("|")]
        return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]

    def run(self) -> dict[str, Any]:
        """Run the Python blocks in order in one namespace; returns the namespace."""
        namespace: dict[str, Any] = {}
        with torch.random.fork_rng():
            for line, code in self.blocks("python"):
                exec(compile("\n" * line + code, str(self.file), "exec"), namespace)
        return namespace

    def check_languages(self) -> None:
        """Check that every code block is in a language that the tests cover."""
        fences = re.findall(r"^```\w+$", self.text, flags=re.MULTILINE)
        assert len(fences) == len(self.blocks("python")) + len(self.blocks("sh"))

    def check_links(self) -> None:
        """Check that linked files and sections, and test folders in commands, exist."""
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", self.text)
        assert links
        for link, section in links:
            file = self.file.parent / link if link else self.file
            assert file.exists(), link
            if section:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert section in {_anchor(heading) for heading in headings}, f"{link}#{section}"
        for word in "\n".join(code for _, code in self.blocks("sh")).split():
            assert not word.startswith("tests/") or (ROOT / word).exists(), word

    @property
    def commands(self) -> list[str]:
        """Command lines that run a Python module."""
        return [line for _, code in self.blocks("sh") for line in code.splitlines() if "python -m" in line]


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub generates for a heading."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def check_command(line: str) -> None:
    """Check that a command's module exists and has its options. It is not run: that takes a compiler, or minutes."""
    module, *arguments = line.split("python -m ")[1].split()
    assert importlib.util.find_spec(module) is not None
    options = [word for word in arguments if word.startswith("--")]
    if options:
        app = importlib.import_module(f"{module}.__main__").app
        described = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
        assert [option for option in options if not re.search(rf"{option}\b", described)] == []
