"""docs/launch.md is true: its sizing table is what the formulas give, and the files it names are there."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from document import ROOT, Document

from alignpro.memory_plan import SETUPS


@pytest.fixture(scope="module")
def document() -> Document:
    return Document("launch.md")


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizing_table", ROOT / "launch" / "sizing" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sizing_table_is_what_the_plan_says(document: Document, sizing: ModuleType) -> None:
    assert "\n".join(sizing.rows()) in document.text


def test_set_ups_are_those_that_there_are(document: Document) -> None:
    assert {path.stem for path in (ROOT / "launch" / "zero").glob("*.json")} == set(SETUPS)
    assert all(f"`{name}`" in document.text for name in SETUPS)


def test_what_it_links_to_and_names_is_there(document: Document) -> None:
    for link in re.findall(r"\]\(([^)#:]+)", document.text):
        assert (document.file.parent / link).exists(), link
    for path in re.findall(r"`((?:launch|tests|benchmarks)/[\w./-]+)`", document.text):
        assert "*" in path or (ROOT / path).exists(), path
