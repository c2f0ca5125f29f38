"""Public data files, if present: all load with their columns detected by name."""

from pathlib import Path

import pytest

from alignpro.config import DataConfig
from alignpro.data import load_prompts

DIRECTORY = Path(__file__).parents[2] / "../shared/data"

pytestmark = pytest.mark.skipif(not DIRECTORY.is_dir(), reason="the public data files are not present")


@pytest.mark.parametrize(
    ("name", "require", "rows", "kept"),
    [
        ("bpo_test.json", ("rewrite", "chosen", "rejected"), 200, 200),
        ("dolly_eval.json", ("response",), 200, 200),
        ("self_instruct_eval.json", ("response",), 252, 252),
        ("vicuna_eval.jsonl", (), 80, 80),
        ("dpo_en_demo.json", ("chosen", "rejected"), 300, 295),
        ("hh_harmless_test.jsonl.gz", ("chosen", "rejected"), 2312, 2308),
        ("hh_harmless_test.jsonl.gz", (), 2312, 2310),
    ],
)
def test_public_file(name, require, rows, kept):
    data = load_prompts(DataConfig(source=str(DIRECTORY / name)), require=require)
    assert (data.report.rows, data.report.kept) == (rows, kept)
    assert all(prompt.text.strip() and prompt.messages[-1].role == "user" for prompt in data.prompts)


def test_answers_missing_from_transcripts_are_reported_by_line():
    path = DIRECTORY / "hh_harmless_test.jsonl.gz"
    data = load_prompts(DataConfig(source=str(path)), require=("chosen", "rejected"))
    assert len(data.report.bad) == 4
    assert all(message.startswith(f"{path}:") and message.endswith("no chosen") for message in data.report.bad)


def test_explicit_mapping_equals_the_detected_one():
    path = str(DIRECTORY / "self_instruct_eval.json")
    columns = {"prompt": "instruction", "context": "context", "response": "output", "metadata.category": "category"}
    mapped = load_prompts(DataConfig(source=path, columns=columns)).prompts
    detected = load_prompts(DataConfig(source=path)).prompts
    assert [(p.id, p.response) for p in mapped] == [(p.id, p.response) for p in detected]
    assert set(mapped[0].metadata) == {"category"}
