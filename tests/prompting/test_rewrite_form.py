"""A rewrite that the prompter writes as an addition to the prompt: what it writes, what the target gets, what can be learned."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import Workshop
from transformers import PreTrainedTokenizerBase

import alignpro
from alignpro.config import MemoryConfig, PromptingConfig, RewriteForm, SFTConfig, validate_config
from alignpro.data import Prompt
from alignpro.errors import ConfigError, DataError
from alignpro.prompting.memory import Memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.meta_prompt import available_meta_prompts
from alignpro.prompting.moves import load_moves
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.rewrite_form import rewrite_from, written_part
from alignpro.training.supervised import sft_pairs

ADDITION = PromptingConfig(form="addition")
FOX = Prompt.from_text("the fox")


@given(st.sampled_from(["whole", "addition"]), st.text(), st.text())
def test_what_was_written_is_found_in_the_rewrite(form: RewriteForm, prompt: str, text: str) -> None:
    written = text.strip()
    rewrite = rewrite_from(form, prompt, written)
    assert written_part(form, prompt, rewrite) == written
    assert form == "whole" or rewrite.startswith(prompt)


def test_the_prompter_writes_the_addition_alone(qwen: PreTrainedTokenizerBase) -> None:
    prompter = PrompterTemplate(qwen, ADDITION)
    tokens = prompter.completion(FOX, "the fox\njumps")
    assert tokens == PrompterTemplate(qwen, PromptingConfig()).completion(FOX, "jumps")
    assert prompter.decode(FOX, tokens) == "the fox\n\njumps"
    assert prompter.decode(FOX, prompter.completion(FOX, "the fox")) == "the fox"
    assert prompter.decode(FOX, []) == "the fox"
    with pytest.raises(DataError, match=r"its rewrite does not begin with the prompt.*set prompting\.form=whole"):
        prompter.completion(FOX, "a fox jumps")
    assert written_part("addition", "the fox", "the fox in short") == "in short"
    assert written_part("addition", "the fox", "the foxes jump") is None  # which goes on in the prompt's last word


def test_a_memory_shows_additions(qwen: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% for each in best %}+{{ each.rewrite }}\n{% endfor %}{{ request }}")
    memory = Memory(MemoryConfig(template=str(template), own=True))
    memory.add(1, [FOX], [["the fox\n\njumps", "a fox"]], [[1.0, 0.5]])
    shown = {
        form: qwen.decode(PrompterTemplate(qwen, ADDITION, memory=MemoryContext(memory, 500, form)).encode(FOX))
        for form in ("whole", "addition")
    }
    assert "+the fox\n\njumps\n+a fox\nthe fox" in shown["whole"]
    assert "+jumps\n+a fox\nthe fox" in shown["addition"]


def test_moves_that_change_the_prompt_are_left_out(tmp_path: Path) -> None:
    whole = load_moves("default")
    bank = whole.of_form("addition")
    assert whole.of_form("whole").moves == whole.moves
    assert {"one_sentence", "few_words", "emphasis"} <= set(bank.moves) < set(whole.moves)
    for pair in bank.pairs([FOX], 20, 0.0, seed=0):
        assert (pair.rewrite or "").startswith("the fox\n\n")
    file = tmp_path / "moves.yaml"
    file.write_text('before: "Now: {{ prompt }}"\ntwice: "{{ prompt }} and {{ prompt }}"')
    with pytest.raises(ConfigError, match="none of the moves adds a text after the prompt"):
        load_moves(str(file)).of_form("addition")


def test_moves_that_are_additions_to_some_prompts_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "moves.yaml"
    changing = {
        "case": "{{ prompt | capitalize }}\n\nBe brief.",
        "suffix": "{{ prompt }}s",
        "mark": "{{ prompt }}?",
        "cut": "{{ prompt[:5] }} x",
        "long": "{% if prompt | length > 900 %}Short: {% endif %}{{ prompt }}\n\nBe brief.",
        "twice": "{{ prompt }}\n\n{{ prompt }}",
    }
    rare = "{% if 'q1' in prompt %}Now: {% endif %}{{ prompt }}\n\nBe brief."
    file.write_text(json.dumps(changing | {"adds": "{{ prompt }} Be brief.", "rare": rare}))
    assert set(load_moves(str(file)).of_form("addition").moves) == {"adds", "rare"}
    file.write_text(json.dumps({"rare": rare}))
    with caplog.at_level(logging.WARNING):
        pairs = sft_pairs(sft_config(tmp_path, ["q0 in short", "q1 in short"], str(file)))
    assert [x.rewrite for x in pairs] == ["q0 in short", "q0\n\nBe brief.", "q1 in short"]
    assert "1 of 4 pairs are no additions to their prompt" in caplog.text


def sft_config(directory: Path, rewrites: list[str], moves: str | None) -> SFTConfig:
    rows = [{"prompt": f"q{i}", "rewrite": text} for i, text in enumerate(rewrites)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(directory / "data.jsonl")}
    data |= {} if moves is None else {"moves": moves, "moves_per_prompt": 2, "copies": 0.0}
    prompting = {"form": "addition"}
    content = {"run": {"out": "out"}, "data": data, "policy": {"path": "model"}, "prompting": prompting}
    return validate_config(SFTConfig, content)


def test_pairs_that_are_no_additions_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [x.rewrite for x in sft_pairs(sft_config(tmp_path, ["q0 in short", "another"], None))] == ["q0 in short"]
    assert "1 of 2 pairs are no additions to their prompt (the first: " in caplog.text
    config = sft_config(tmp_path, ["another", "q0 in short"], None)
    (tmp_path / "data.jsonl").write_text((tmp_path / "data.jsonl").read_text().replace('"q1"', '"q0"'))
    assert [x.rewrite for x in sft_pairs(config)] == ["q0 in short"]  # of the two pairs of one prompt
    pairs = sft_pairs(sft_config(tmp_path, ["q0 in short", "another"], "default"))
    assert [x.text for x in pairs] == ["q0", "q0", "q0", "q1", "q1"]
    with pytest.raises(DataError, match=r"2 of 2 pairs are no additions .*set prompting\.form=whole"):
        sft_pairs(sft_config(tmp_path, ["another", "q"], None))


@pytest.mark.parametrize(("form", "name"), [("addition", "clarify"), ("whole", "addition")])
def test_a_meta_prompt_that_asks_for_the_other_form_is_refused(form: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"meta_prompt={name} asks for .*set form="):
        validate_config(PromptingConfig, {"form": form, "meta_prompt": name})


def test_the_form_of_every_built_in_meta_prompt_is_known() -> None:
    fitting = {form: set[str]() for form in ("whole", "addition")}
    for name in available_meta_prompts():
        for form, names in fitting.items():
            with suppress(ConfigError):
                names.add(validate_config(PromptingConfig, {"form": form, "meta_prompt": name}).meta_prompt)
    assert fitting["whole"] & fitting["addition"] == {"none"}


def test_a_run_trains_and_uses_additions(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["run.steps=1", "prompting.form=addition", "run.eval_prompts=1"]
    assert workshop.run("train", out, *settings, "run.sample_every=1") == 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert all(each["sample"].startswith(each["prompt"]) for each in samples)
    assert any(len(each["sample"]) > len(each["prompt"]) + 2 for each in samples)
    ((rewritten,),) = alignpro.Rewriter.load(out).rewrite(["explain dns"])
    assert rewritten.rewrite.startswith("explain dns\n\n")
