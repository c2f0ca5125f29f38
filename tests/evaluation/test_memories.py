"""Comparisons of prompters with a memory of past rewrites, which a saved prompter carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished_run

from alignpro.config import EvalConfig, MemoryConfig, OptimalConfig, validate_config
from alignpro.data import Prompt
from alignpro.demo.world import prompt_records, write_records
from alignpro.environments.rewriter import Rewriter
from alignpro.environments.trained_prompter import TrainedPrompter
from alignpro.errors import ModelError
from alignpro.evaluation.evaluate import evaluate
from alignpro.evaluation.optimal import optimal
from alignpro.prompting.memory import FILE_NAME, Memory
from alignpro.prompting.memory_template import MemoryTemplate
from alignpro.training.preflight import check_inputs

Directory = Callable[[str], Path]

SOURCE = "{% for each in best %}+{{ each.rewrite }} {% endfor %}{{ request }}"


@pytest.fixture
def run(model_directory: Directory, tmp_path: Path) -> Path:
    """Return a finished run whose prompter remembers a rewrite of one of the prompts in ``prompts.jsonl``, and others."""
    out = tmp_path / "run"
    out.mkdir()
    finished_run(out, model_directory)
    records = prompt_records(3, 0, heldout=True)
    write_records(tmp_path / "prompts.jsonl", records)
    seen = [Prompt.from_text(each["prompt"]) for each in [records[0], *prompt_records(12, 0, heldout=False)]]
    memory = Memory(MemoryConfig(best=1, worst=0), MemoryTemplate(SOURCE, "short"))
    memory.add(1, seen, [[f"past {i}"] for i in range(len(seen))], [[i / 16] for i in range(len(seen))])
    (out / "model" / FILE_NAME).write_bytes(memory.dumps())
    (tmp_path / "length.py").write_text(
        "def score(prompts, responses):\n    return [len(set(each)) / 8 for each in responses]\n"
    )
    return out


def sections(run: Path, models: Directory, **others: Any) -> dict[str, Any]:
    beside = run.parent
    return {
        "out": str(beside / "evaluation"),
        "data": {"source": str(beside / "prompts.jsonl"), "holdout": 0},
        "target": {"path": str(models("llama")), "device": "cpu"},
        "prompter": {"path": str(run / "model"), "device": "cpu"},
        "reward": {"components": [{"kind": "function", "function": f"{beside}/length.py:score"}]},
        "rewrite": {"max_tokens": 12, "temperature": 0.0},
        "respond": {"max_tokens": 4},
        "prompts": 3,
        **others,
    }


def test_all_prompters_of_an_evaluation_see_the_memory_that_rewriting_shows(
    run: Path, model_directory: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignpro.evaluation.evaluate.write_outputs", lambda *_: None)
    reference = {"path": str(model_directory("qwen2")), "device": "cpu"}
    arms = {"reference": reference, "strengths": [0], "arms": ["sft_prompter", "align_pro", "dial_0"]}
    sampled = {"rewrites_per_prompt": 2, "responses_per_rewrite": 2}
    found = evaluate(validate_config(EvalConfig, sections(run, model_directory, **arms, **sampled)))

    def rewrites(arm: str) -> list[str]:
        return [row["rewrite"] for row in found.rows if row["arm"] == arm]

    texts = list(dict.fromkeys(row["prompt"] for row in found.rows))
    with_memory = [group[0].rewrite for group in Rewriter.load(run).rewrite(texts)]
    assert [each for each in rewrites("align_pro") if each in with_memory] == rewrites("align_pro")
    assert rewrites("dial_0") == rewrites("sft_prompter")
    (kl,) = (arm.kl for arm in found.arms if arm.name == "dial_0")
    assert kl == pytest.approx(0, abs=1e-6)  # ρ_sft against ρ_sft, in the same context
    first, second = (note for note in found.notes if "memory" in note)
    assert first.startswith("All prompters see a memory of 13 past rewrites of 13 training prompts (template ")
    assert second == "1 of the 3 prompts are in the memory, so they were trained on: this is no held-out reward."

    served = TrainedPrompter.load(run)
    tokens = [served.encode(Prompt.from_text(text), 12) for text in texts]
    assert all("+past " in served.model.tokenizer.decode(each) for each in tokens)


def test_resampling_without_training_sees_it_too(run: Path, model_directory: Directory, tmp_path: Path) -> None:
    given = sections(run, model_directory, rewrite={"max_tokens": 12}, prompts=2, candidates=2)
    summary = optimal(validate_config(OptimalConfig, given))
    assert summary["memory"][0].startswith("All prompters see a memory of 13 past rewrites")


@pytest.mark.parametrize("key", ["prompter", "reference"])
def test_a_damaged_memory_is_found_before_a_model_is_loaded(run: Path, model_directory: Directory, key: str) -> None:
    (run / "model" / FILE_NAME).write_text("{")
    given = sections(run, model_directory)
    config = validate_config(EvalConfig, given | {"prompter": None} | {key: given["prompter"]})
    with pytest.raises(
        ModelError, match=r"model/memory\.jsonl:1: the memory of past rewrites is damaged .*: restore the file"
    ):
        check_inputs(config)
