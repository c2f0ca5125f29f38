"""README.md's figures are those that were measured."""

from __future__ import annotations

import json

from document import ROOT

from benchmarks.demo import HEADER, rows


def test_the_demos_table_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "demo.json").read_text())
    assert "\n".join([*HEADER, *rows(measured["runs"])]) in (ROOT / "README.md").read_text(encoding="utf-8")
