"""docs/launch.md is correct: its sizing table matches the formulas, and the files it names exist."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from document import ROOT, Document, recorded

from alignpro.planning.memory import SETUPS

DOCUMENT = Document("launch.md")


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sizing_table", ROOT / "launch" / "sizing" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sizing_table_matches_the_plan(sizing: ModuleType) -> None:
    assert "\n".join(sizing.rows()) in DOCUMENT.text


def test_all_set_ups_are_listed() -> None:
    assert {path.stem for path in (ROOT / "launch" / "zero").glob("*.json")} == set(SETUPS)
    assert all(f"`{name}`" in DOCUMENT.text for name in SETUPS)


def test_figures_match_the_recorded_results() -> None:
    measured = recorded("distributed")
    ratios = measured["ratios"]
    assert f"takes {ratios['z2_step_over_alone']:.2f} of the time" in DOCUMENT.text
    assert f"gathering included, {ratios['z3_rollout_over_z2']:.2f} of" in DOCUMENT.text
    for found in measured["setups"].values():
        seconds = (found["step_s"], *(found["phases"][phase] for phase in ("rollout", "credit", "update")))
        assert " | ".join(f"{each:.2f} s" for each in seconds) in DOCUMENT.text
    for found in measured["memory"].values():
        cells = (
            f"{found['measured'][p] / 2**20:.0f} ({found['planned'][p] / 2**20:.0f})" for p in ("rollout", "update")
        )
        assert " | ".join(cells) in DOCUMENT.text


def test_named_files_exist() -> None:
    for path in re.findall(r"`((?:launch|tests|benchmarks)/[\w./-]+)`", DOCUMENT.text):
        assert "*" in path or (ROOT / path).exists(), path
