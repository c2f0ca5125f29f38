"""The card beside a saved prompter: its code runs without this package and gives this package's rewrite."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import policy_config, tiny_transformer
from tiny_runs import Workshop
from transformers import GenerationMixin

import alignpro
from alignpro.config import AdapterConfig, PromptingConfig
from alignpro.data import Prompt
from alignpro.demo.models import prompter_tokenizer
from alignpro.models.adapters import add_adapter
from alignpro.models.loading import load_language_model, load_trainable
from alignpro.models.saving import save_pretrained
from alignpro.prompting.model_card import licence_of, write_card, write_section
from alignpro.prompting.prompter_prompt import PrompterTemplate


def code_of_card(workshop: Workshop, root: Path, adapter: str, form: str) -> str:
    """Train a prompter and return the code of its card."""
    meta_prompt = root / "mine.jinja"
    meta_prompt.write_text("{# short #}Say it better: {{ prompt }}")
    settings = [
        "run.steps=1",
        f"prompting.meta_prompt={meta_prompt}",
        f"policy.adapter.kind={adapter}",
        f"prompting.form={form}",
    ]
    assert workshop.run("train", root / adapter, *settings) == 0
    card = (root / adapter / "model" / "README.md").read_text()
    assert "Say it better: {{ prompt }}" in card
    code, served = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    compile(served, "served", "exec")
    assert "alignpro" not in code + served
    ((command),) = re.findall(r"```sh\n(vllm serve .*)\n```", card)
    assert ("--lora-modules prompter=" in command) == (adapter == "lora")
    training = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, flags=re.MULTILINE))
    assert training["λ"].endswith("per nat")
    assert training["steps, seed"] == "1, 0"
    assert float(training["KL to the reference, nats per sequence"]) == pytest.approx(
        0, abs=1e-5
    )  # before the first step
    return code.replace("path/to/this/directory", str(root / adapter / "model"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_its_code_gives_the_rewrite(workshop: Workshop, tmp_path: Path) -> None:
    adapters = {"full": "whole", "lora": "addition"}
    script = tmp_path / "use.py"
    script.write_text("\n".join(code_of_card(workshop, tmp_path, *each) for each in adapters.items()))
    told = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    expected = ""
    for adapter in adapters:
        ((rewritten,),) = alignpro.Rewriter.load(tmp_path / adapter).rewrite(["explain dns to my mum"])
        expected += rewritten.rewrite + "\n"
    assert told == expected


TEMPLATE = (
    "{{ date_string }}{% for message in messages %}<|im_start|><|{{ message['role'] }}|>{{ message['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|><|assistant|>"
    "{% if enable_thinking is not defined or enable_thinking %}<|system|>{% endif %}{% endif %}"
)
"""Of a model whose tokenizer ends texts with another token, and which reasons unless it is told not to."""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_its_code_gives_the_same_input_and_stops_at_the_same_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = prompter_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", TEMPLATE
    tiny_transformer("qwen2", eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    start = load_trainable(policy_config(tmp_path / "base"), 0)
    model = add_adapter(start, AdapterConfig.model_validate({"kind": kind} | ({"rank": 4} if kind == "lora" else {})))
    prompter = PrompterTemplate(model.tokenizer, PromptingConfig(), stop_token_ids=model.end_token_ids)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    save_pretrained(model, tmp_path / "model")
    write_card(tmp_path / "model", prompter, 3)

    asked = []
    generate = GenerationMixin.generate

    def record(self: Any, **options: Any) -> Any:
        asked.append((options["input_ids"].tolist(), options.get("eos_token_id", self.generation_config.eos_token_id)))
        return generate(self, **options)

    monkeypatch.setattr(GenerationMixin, "generate", record)
    code, request = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), flags=re.DOTALL)
    exec(code.replace("path/to/this/directory", str(tmp_path / "model")), {})
    assert asked == [([prompter.encode(Prompt.from_text("explain dns to my mum"))], ends)]
    assert '"chat_template_kwargs": {' in request
    assert ('"stop_token_ids": [' in request) == (kind == "lora")
    assert load_language_model(policy_config(tmp_path / "model")).end_token_ids[-1] == (
        ends[0] if kind == "lora" else ends[1]
    )


def test_only_prompters_have_one(workshop: Workshop, tmp_path: Path) -> None:
    assert workshop.run("sft", tmp_path / "sft", "run.steps=1") == 0
    assert "A prompter" in (tmp_path / "sft" / "model" / "README.md").read_text()
    assert workshop.run("rlhf", tmp_path / "rlhf", "run.steps=1") == 0
    assert not (tmp_path / "rlhf" / "model" / "meta_prompt.jinja").exists()
    card = (tmp_path / "rlhf" / "model" / "README.md").read_text()
    assert "used like the model that it was trained from" in card
    assert "| estimator |" in card


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    write_section(tmp_path, "Training", ["| base | x |"])
    write_section(tmp_path, "Held-out evaluation", ["0.5"])
    write_section(tmp_path, "Held-out evaluation", ["0.7"])
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Held-out evaluation") == card.count("## Training") == 1
    assert "0.7" in card
    assert "0.5" not in card
    write_section(tmp_path, "Training", ["| base | y |"])
    card = (tmp_path / "README.md").read_text()
    assert card.index("| base | y |") < card.index("0.7")
    assert "| base | x |" not in card


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\nlibrary_name: t\nlicense: apache-2.0\ntags: [x]\n---\n# A"}, "apache-2.0"),
        ({"README.md": "# license: none\n", "LICENSE": "\n  MIT License\nCopyright"}, "MIT License"),
        ({}, None),
    ],
)
def test_the_licence_is_what_the_directory_tells(tmp_path: Path, files: dict[str, str], licence: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == licence
