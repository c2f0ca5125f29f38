"""The task given to all entrants: models, templates and prompts on disk, and the training parameters."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.device import empty_cache
from benchmarks.models import make_chat_template, make_model, make_tokenizer, random_text
from benchmarks.workload import Workload

REWARD = "benchmarks.training.reward:variety"


@dataclass(frozen=True)
class Task:
    """A prompter and a frozen target with random weights, and enough prompts that none repeats."""

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

    @property
    def prompter(self) -> Path:
        """The directory of the model that is trained."""
        return self.directory / "prompter"

    @property
    def target(self) -> Path:
        """The directory of the frozen model."""
        return self.directory / "target"


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
    (directory / "meta_prompt.jinja").write_text(meta_prompt + "{{ prompt }}", encoding="utf-8")
    with (directory / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in prompts)
    return task
