"""The card beside a saved prompter: its code runs without this package and gives this package's rewrite."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import Workshop

import alignpro


def code_of_card(workshop: Workshop, root: Path, adapter: str) -> str:
    """Train a prompter and return the code of its card."""
    meta_prompt = root / "mine.jinja"
    meta_prompt.write_text("{# short #}Say it better: {{ prompt }}")
    settings = ["run.steps=1", f"prompting.meta_prompt={meta_prompt}", f"policy.adapter.kind={adapter}"]
    assert workshop.run("train", root / adapter, *settings) == 0
    card = (root / adapter / "model" / "README.md").read_text()
    assert "Say it better: {{ prompt }}" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "alignpro" not in code
    return code.replace("path/to/this/directory", str(root / adapter / "model"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_its_code_gives_the_rewrite(workshop: Workshop, tmp_path: Path) -> None:
    adapters = ["full", "lora"]
    script = tmp_path / "use.py"
    script.write_text("\n".join(code_of_card(workshop, tmp_path, adapter) for adapter in adapters))
    told = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    expected = ""
    for adapter in adapters:
        ((rewritten,),) = alignpro.Rewriter.load(tmp_path / adapter).rewrite(["explain dns to my mum"])
        expected += rewritten.rewrite + "\n"
    assert told == expected


def test_only_prompters_have_one(workshop: Workshop, tmp_path: Path) -> None:
    assert workshop.run("sft", tmp_path / "sft", "run.steps=1") == 0
    assert "A prompter" in (tmp_path / "sft" / "model" / "README.md").read_text()
    assert workshop.run("rlhf", tmp_path / "rlhf", "run.steps=1") == 0
    assert not (tmp_path / "rlhf" / "model" / "meta_prompt.jinja").exists()
