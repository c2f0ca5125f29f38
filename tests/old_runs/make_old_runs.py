"""Makes old_runs.tar.xz: a run of each kind, and what an uninterrupted run gives.

    OMP_NUM_THREADS=1 python tests/old_runs/make_old_runs.py

It must be run by the version of the project that README.md names. All paths in the runs are relative to the archive.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alignpro.demo.models import prompter_tokenizer, target_tokenizer
from alignpro.demo.world import prompt_records, prompter_records, target_records, write_records

ARCHIVE = Path(__file__).with_name("old_runs.tar.xz")
PYTHON = Path(sys.executable)

REWARD = '''"""Rewards in [0, 1] that depend on every letter of the response."""

import random


def steady(prompts, responses):
    return [sum(map(ord, response)) % 17 / 17 for response in responses]


def score(prompts, responses):
    """Depends on the global random generator too, whose state is in the checkpoints."""
    return [0.5 * (value + random.random()) for value in steady(prompts, responses)]
'''

PROMPTER = {"path": "models/prompter", "device": "cpu"}
TARGET = {"path": "models/target", "device": "cpu"}
REWARDS = {"components": [{"kind": "function", "function": "reward.py:score"}]}
META_PROMPT = {"meta_prompt": "clarify"}
LORA = {"kind": "lora", "rank": 2}
SAMPLING = {"max_tokens": 6}
RUN: dict[str, Any] = {
    "run": {
        "steps": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 1,
        "eval_every": 2,
        "eval_prompts": 2,
        "sample_every": 1,
        "tensorboard": False,
    },
    "data": {"source": "data/prompts.jsonl", "holdout": 0.2},
    "optimizer": {"learning_rate": 0.02, "warmup_steps": 4, "micro_batch_size": 4},
}
TRAIN = RUN | {
    "policy": PROMPTER,
    "target": TARGET,
    "reward": REWARDS,
    "prompting": META_PROMPT,
    "rollout": {"prompts_per_step": 3, "rewrites_per_prompt": 2, "rewrite": SAMPLING, "respond": SAMPLING},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": (
        "train",
        TRAIN | {"objective": {"advantage": "running_baseline", "kl": {"target": 0.001, "horizon": 10}}},
    ),
    "lora": ("train", TRAIN | {"policy": PROMPTER | {"adapter": LORA}}),
    "activated_lora": (
        "train",
        TRAIN | {"policy": PROMPTER | {"adapter": LORA | {"activated": True}}, "target": "policy"},
    ),
    "rlhf": (
        "rlhf",
        RUN
        | {
            "policy": TARGET,
            "reward": REWARDS,
            "rollout": {"prompts_per_step": 3, "responses_per_prompt": 2, "respond": SAMPLING},
            "objective": {"loss": "ppo_clip", "advantage": "gae", "minibatches": 2},
        },
    ),
    "sft": ("sft", RUN | {"data": {"source": "data/rewrites.jsonl"}, "policy": PROMPTER, "batch_size": 6}),
    "reward": ("reward", RUN | {"data": {"source": "data/pairs.jsonl"}, "model": TARGET, "batch_size": 4}),
    "zero2": ("train", TRAIN | {"deepspeed": {"config": "z2"}}),
}
EVALUATION = {
    "out": "evaluation",
    "data": {"source": "data/heldout.jsonl", "holdout": 0.0},
    "target": TARGET,
    "reference": PROMPTER,
    "prompter": {"path": "runs/train/model", "device": "cpu"},
    "oracle": {"path": "runs/rlhf/model", "device": "cpu"},
    "reward": {
        "components": [
            {"kind": "function", "function": "reward.py:steady", "weight": 0.5},
            {
                "kind": "model",
                "model": {"path": "runs/reward/model", "device": "cpu"},
                "scale": 0.1,
                "offset": 0.5,
                "weight": 0.5,
            },
        ]
    },
    "prompting": META_PROMPT,
    "prompts": 4,
    "rewrites_per_prompt": 2,
    "rewrite": SAMPLING,
    "respond": SAMPLING,
    "gibbs_candidates": 3,
    "bound": True,
    "bootstrap": 100,
}


def main() -> None:
    """Make everything in a temporary directory, which becomes the working directory, and pack it."""
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        write_inputs()
        for name, (command, config) in RUNS.items():
            given = f"{name}.yaml"
            Path(given).write_text(yaml.safe_dump(config))
            alignpro(command, given, f"run.out=runs/{name}", ranks=2 if name == "zero2" else None)
            alignpro(command, given, "run.out=whole", "run.steps=4", ranks=2 if name == "zero2" else None)
            Path("expected", name).mkdir(parents=True)
            for kept in Path("whole").glob("*.jsonl"):
                kept.rename(Path("expected", name, kept.name))
            shutil.rmtree("whole")
        Path("evaluation.yaml").write_text(yaml.safe_dump(EVALUATION))
        alignpro("eval", "evaluation.yaml")
        for name in ("train", "lora", "activated_lora"):
            rewriting = ["--data", "data/heldout.jsonl", "--out", f"expected/{name}/rewrites.jsonl"]
            alignpro("rewrite", "--run", f"runs/{name}", *rewriting, "--answer", "--n", "4", "--temperature", "1")
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            for name in ("models", "data", "reward.py", "runs", "evaluation", "expected"):
                archive.add(name, filter=_anonymous)


def write_inputs() -> None:
    """Write the models that the runs start from, the data and the reward."""
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # far from uniform
    }
    tokenizers = {"target": target_tokenizer(), "prompter": prompter_tokenizer()}
    special = {
        name: {
            "vocab_size": len(each),
            "bos_token_id": each.bos_token_id,
            "eos_token_id": each.eos_token_id,
            "pad_token_id": each.pad_token_id,
        }
        for name, each in tokenizers.items()
    }
    torch.manual_seed(0)
    models = {
        "target": LlamaForCausalLM(LlamaConfig(**size, **special["target"])),
        "prompter": Qwen2ForCausalLM(Qwen2Config(**size, **special["prompter"], tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.save_pretrained(Path("models", name))
        tokenizers[name].save_pretrained(Path("models", name))
    Path("data").mkdir()
    write_records(Path("data/prompts.jsonl"), prompt_records(24, 0, heldout=False))
    write_records(Path("data/heldout.jsonl"), prompt_records(4, 0, heldout=True))
    write_records(Path("data/rewrites.jsonl"), prompter_records(24, 0))
    answers = target_records(24, 0, careless=False)
    pairs = [{**row, "chosen": row["response"], "rejected": "huh?"} for row in answers]
    write_records(Path("data/pairs.jsonl"), pairs)
    Path("reward.py").write_text(REWARD)


def alignpro(*arguments: str, ranks: int | None = None) -> None:
    """Run a command, on some ranks under the deepspeed launcher if they are given."""
    launcher = [str(PYTHON), "-m"]
    if ranks is not None:
        launcher = [str(PYTHON.with_name("deepspeed")), "--num_accelerators", str(ranks), "--module"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launcher, "alignpro", *arguments], check=True, env=environment)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out owner and time; None for a lock, and for what is written for people and never read again."""
    if Path(member.name).name in ("run.lock", "report.html", "figure.png"):
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
