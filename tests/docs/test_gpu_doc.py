"""docs/gpu.md has the parts of the run with their time limits."""

from __future__ import annotations

import re

from document import Document

from benchmarks.gpu.parts import PARTS, Place
from benchmarks.hardware import ROOT

DOCUMENT = Document("gpu.md")


def test_the_parts_and_their_limits_are_those_of_the_run() -> None:
    place = Place("cuda", False, ROOT)
    rows = [
        line.strip("|").split("|") for line in DOCUMENT.text.splitlines() if line.startswith("|") and " s |" in line
    ]
    found = {name.strip(): seconds.strip() for name, _, seconds in rows}
    assert "It fits two calls of seven minutes:" in DOCUMENT.text
    for call in re.findall(r"\.ci/gpu ((?:\w+ ?)+)$", DOCUMENT.text, flags=re.MULTILINE):
        assert sum(float(found[name].removesuffix(" s")) for name in call.split()) <= 6 * 60, (
            call
        )  # and a minute beside
    assert found == {name: f"{sum(c.seconds for c in part(place)):.0f} s" for name, part in PARTS.items()}
