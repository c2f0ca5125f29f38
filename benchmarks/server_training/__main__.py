"""python -m benchmarks.server_training: train a prompter against a model in process, and against the same model on a server.

Both prompters, and the one before training, are then compared on the same held-out prompts with the model in process. A run
that is interrupted continues when the command is given again.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import alignpro
from alignpro.config import EvalConfig, ModelConfig, validate_config
from alignpro.data import load_prompts
from alignpro.evaluation.arms import ArmSampler
from alignpro.models.loading import load_language_model
from alignpro.rewards import build_reward
from alignpro.targets.build import build_target
from alignpro.targets.servers import NO_SERVERS
from alignpro.theory.statistics import mean_estimate, paired_estimate
from benchmarks import command
from benchmarks.server_training import advice
from benchmarks.session import Session
from benchmarks.table import print_table

REWRITE = {"max_tokens": 16, "temperature": 0.8}
RESPOND = {"max_tokens": 64, "temperature": 0.7}
TRAINING_PROMPTS = 24
"""The others are held out."""
META_PROMPT = "Rewrite this question: {{ prompt }}\n"
"""Short, since the same tokens are read for every sample."""
ARMS = ("untrained", "in process", "server")

app = command.new_app()


@app.command(help=__doc__)
def run(
    model: Annotated[Path, typer.Option(help="Directory of the model that is prompter and target.")],
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server that has the same model.")],
    served: Annotated[str, typer.Option(help="The model's name on the server.")] = "smollm2",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the LoRA.")] = 5e-4,
    samples: Annotated[int, typer.Option(min=2, help="Rewrites of each held-out prompt, and answers to each.")] = 2,
    threads: command.Threads = None,
    out: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/server-training"),
    json_file: command.ResultsFile = None,
) -> None:
    """See the module."""
    session = Session("server_training", device="cpu", threads=threads, file=json_file)
    out.mkdir(parents=True, exist_ok=True)
    texts = advice.questions()
    advice.write(out / "training.jsonl", texts[:TRAINING_PROMPTS])
    advice.write(out / "heldout.jsonl", texts[TRAINING_PROMPTS:])
    (out / "meta_prompt.jinja").write_text(META_PROMPT)
    document: dict[str, Any] = {"run": session.describe(), "server": server_version(url), "training": {}}
    targets: dict[str, dict[str, Any]] = {
        "in process": {"path": str(model)},
        "server": {"endpoint": {"base_url": url, "model": served}},
    }
    for name, target in targets.items():
        finished = alignpro.train(
            training(out, out / name.replace(" ", "_"), model, target, steps, learning_rate), resume=True
        )
        keys = ("reward/mean", "kl", "seconds/rollout", "seconds/update", "endpoint/requests", "endpoint/tokens")
        document["training"][name] = [{key: row[key] for key in keys if key in row} for row in finished.metrics]
        session.save(document)
    document |= comparison(out, model, samples)
    session.save(document)
    rows = [
        [name, *(format(each[key], ".3f") for key in ("value", "low", "high"))]
        for name, each in document["rewards"].items()
    ]
    rows.append(
        ["server - in process", *(format(document["difference"][key], ".3f") for key in ("value", "low", "high"))]
    )
    print_table(session.console, ["arm", "reward", "low", "high"], rows, left=1, title="held-out prompts")
    session.finish()


def training(
    out: Path, run_directory: Path, model: Path, target: dict[str, Any], steps: int, learning_rate: float
) -> dict[str, Any]:
    """The configuration of a run, which is the same for both but for the target."""
    return {
        "run": {"out": str(run_directory), "steps": steps, "checkpoint_every": 1, "tensorboard": False},
        "data": {"source": str(out / "training.jsonl"), "holdout": 0},
        "policy": {"path": str(model), "adapter": {"kind": "lora", "rank": 8}},
        "target": target,
        "reward": reward(),
        "prompting": prompting(out),
        "rollout": {
            "prompts_per_step": 4,
            "rewrites_per_prompt": 4,
            "rewrite": REWRITE,
            "respond": RESPOND,
        },
        "objective": {"kl": {"coef": 0.01}},
        "optimizer": {"learning_rate": learning_rate},
    }


def prompting(out: Path) -> dict[str, Any]:
    """How the prompter is asked."""
    return {"meta_prompt": str(out / "meta_prompt.jinja"), "max_prompt_tokens": 128}


def reward() -> dict[str, Any]:
    """The reward of both runs and of the comparison."""
    return {"components": [{"kind": "function", "function": f"{advice.__name__}:commas"}]}


def comparison(out: Path, model: Path, samples: int) -> dict[str, Any]:
    """Mean rewards of the prompters on the held-out prompts, and the difference, paired by prompt; 95 % intervals."""
    config = validate_config(
        EvalConfig,
        {
            "out": str(out / "comparison"),
            "data": {"source": str(out / "heldout.jsonl"), "holdout": 0},
            "target": {"path": str(model)},
            "reward": reward(),
            "prompting": prompting(out),
            "rewrite": REWRITE,
            "respond": RESPOND,
            "responses_per_rewrite": samples,
        },
    )
    target = build_target(config.target, None, config.prompting, config.respond, connect=NO_SERVERS.connect)
    sampler = ArmSampler(
        config, load_prompts(config.data).prompts, target, build_reward(config.reward, session=NO_SERVERS)
    )
    paths = {"untrained": model, **{name: out / name.replace(" ", "_") / "model" for name in ARMS[1:]}}
    with torch.no_grad():
        raw = {
            name: sampler.sample_rewrites("align_pro", load_language_model(ModelConfig(path=str(path))), samples).raw
            for name, path in paths.items()
        }
    return {
        "heldout_prompts": len(sampler.prompts),
        "rewrites_per_prompt": samples,
        "responses_per_rewrite": samples,
        "rewards": {name: mean_estimate(values).as_dict() for name, values in raw.items()},
        "difference": paired_estimate(raw["server"], raw["in process"]).as_dict(),
        "gain": {name: paired_estimate(raw[name], raw["untrained"]).as_dict() for name in ARMS[1:]},
    }


def server_version(url: str) -> str | None:
    """What the server says of itself; None if it says nothing."""
    try:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/version", timeout=10) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    app()
