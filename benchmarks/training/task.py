"""The task given to all entrants: models, templates and prompts on disk, and the training parameters."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alignpro.config import ModelConfig
from alignpro.prompting.tokenization import load_tokenizer
from benchmarks.device import empty_cache
from benchmarks.models import make_chat_template, make_model, make_tokenizer, random_text
from benchmarks.workload import Workload

REWARD = "benchmarks.training.reward:variety"
LORA_ALPHA = 32.0


@dataclass(frozen=True)
class Task:
    """A prompter and a frozen target: random ones with prompts of which none repeats, or one model directory for both."""

    workload: Workload
    directory: Path
    """Holds ``prompter``, ``target`` (model and tokenizer), ``meta_prompt.jinja`` and ``prompts.jsonl``."""
    meta_prompt: str
    """Text that the prompter reads before x."""
    before: str
    """Text that the target reads before x'."""
    after: str
    prompts: list[str]
    steps: int
    """Number of steps, including the warm-up."""
    seed: int
    learning_rate: float = 1e-5
    kl_coef: float = 0.05
    model: Path | None = None
    """The directory of a real model that is prompter and target; its sequences end where it ends them."""
    lora: int | None = None
    """The rank of the LoRA that is trained; all weights are trained if absent."""

    @property
    def prompter(self) -> Path:
        """The directory of the model that is trained."""
        return self.model or self.directory / "prompter"

    @property
    def target(self) -> Path:
        """The directory of the frozen model."""
        return self.model or self.directory / "target"


def make_task(
    workload: Workload,
    directory: Path,
    *,
    steps: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Task:
    """Write a task to an empty directory; weights are initialised in ``dtype`` on ``device``."""
    generator = random.Random(seed)
    meta_prompt = random_text(workload.meta_prompt, generator)
    before, after = random_text(workload.before, generator), random_text(workload.after, generator)
    prompts = [random_text(workload.prompt, generator) for _ in range(steps * workload.prompts)]
    task = Task(workload, directory, meta_prompt, before, after, prompts, steps, seed)
    # Longer than needed, for recipes that pad; the models' inputs do not depend on it.
    context = 2 * max(workload.prompter_input + workload.rewrite, workload.target_input + workload.response)
    for place, shape, template in (
        (task.prompter, workload.prompter, make_chat_template("", "")),
        (task.target, workload.target, make_chat_template(before, after)),
    ):
        model = make_model(shape, context=context, seed=seed, dtype=dtype, device=device)
        model.save_pretrained(place)
        make_tokenizer(template, shape.vocabulary).save_pretrained(place)
        del model  # free its memory before creating the next model
        if device is not None:
            empty_cache(device)
    _write_prompts(task)
    return task


def make_task_of(
    model: Path, workload: Workload, directory: Path, texts: Sequence[str], *, steps: int, seed: int, lora: int | None
) -> Task:
    """Write the task of a model directory to an empty one, with its own chat template and no meta-prompt.

    Args:
        model: The model, with its tokenizer.
        workload: Its shape, the longest sequences, and the counts.
        directory: Where prompts and configuration are written.
        texts: The prompts, which repeat if there are too few; if empty, they are random tokens.
        steps: Number of steps, including the warm-up.
        seed: Of random prompts and of the run.
        lora: The rank of the LoRA, or None.
    """
    count = steps * workload.prompts
    prompts = [texts[i % len(texts)] for i in range(count)] if texts else _random_prompts(model, workload, count, seed)
    task = Task(workload, directory, "", "", "", prompts, steps, seed, model=model, lora=lora)
    _write_prompts(task)
    return task


def _random_prompts(model: Path, workload: Workload, count: int, seed: int) -> list[str]:
    generator, tokenizer = random.Random(seed), load_tokenizer(ModelConfig(path=str(model)))
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in special]
    drawn = [generator.choices(ids, k=workload.prompt) for _ in range(count)]
    return [str(tokenizer.decode(tokens)) for tokens in drawn]


def _write_prompts(task: Task) -> None:
    (task.directory / "meta_prompt.jinja").write_text(task.meta_prompt + "{{ prompt }}", encoding="utf-8")
    with (task.directory / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in task.prompts)
