"""The card beside a saved prompter: its code runs without this package and gives this package's rewrite."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import Workshop

import alignpro


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_its_code_gives_the_rewrite(workshop: Workshop, tmp_path: Path, adapter: str) -> None:
    meta_prompt = tmp_path / "mine.jinja"
    meta_prompt.write_text("{# short #}Say it better: {{ prompt }}")
    kind = f"policy.adapter.kind={adapter}"
    assert workshop.run("train", tmp_path / "run", "run.steps=1", f"prompting.meta_prompt={meta_prompt}", kind) == 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "Say it better: {{ prompt }}" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "alignpro" not in code
    script = tmp_path / "use.py"
    script.write_text(code.replace("path/to/this/directory", str(tmp_path / "run" / "model")))
    told = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rewriter = alignpro.Rewriter.load(tmp_path / "run")
    ((rewritten,),) = rewriter.rewrite(["explain dns to my mum"])
    assert told.strip() == rewritten.rewrite


def test_only_prompters_have_one(workshop: Workshop, tmp_path: Path) -> None:
    assert workshop.run("sft", tmp_path / "sft", "run.steps=1") == 0
    assert "A prompter" in (tmp_path / "sft" / "model" / "README.md").read_text()
    assert workshop.run("rlhf", tmp_path / "rlhf", "run.steps=1") == 0
    assert not (tmp_path / "rlhf" / "model" / "meta_prompt.jinja").exists()
