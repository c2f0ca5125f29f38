"""python -m benchmarks.cpu_dtype: a model in bfloat16 beside float32 on a CPU: steps, memory, log-probabilities, gradients.

Each dtype decodes in a process of its own. Log-probabilities of drawn tokens are compared with those of the model's float32
weights in float64, of transformers in bfloat16 too; the gradient of their mean by all weights with that of the same weights in
float32; and what sampling recorded with what training computes, before and after an update of all weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignpro.config import ModelConfig, OptimizerConfig
from alignpro.engine import Engine, SamplingParams
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.sequences import SequenceBatch
from alignpro.training.backend import TorchBackend
from alignpro_kernels import linear_logprob
from benchmarks import command
from benchmarks.session import Session
from benchmarks.table import print_table

DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 32, 128)
PROMPT_TOKENS = 32

app = command.new_app()


@app.command(help=__doc__)
def run(
    model: Annotated[Path, typer.Option(help="Directory of a model.")] = Path("runs/smollm2"),
    part: Annotated[list[str] | None, typer.Option(help="speed, accuracy; default: both.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each batch.")] = 5,
    new: Annotated[int, typer.Option(min=2, help="Tokens of each completion.")] = 24,
    threads: command.Threads = None,
    json_file: command.ResultsFile = None,
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """See the module."""
    if threads is not None:
        torch.set_num_threads(threads)
    if measure is not None:
        print(json.dumps(speed(model, measure, rounds, new)))
        return
    session = Session("cpu_dtype", device="cpu", threads=threads, file=json_file)
    document: dict[str, Any] = json.loads(session.file.read_text()) if session.file.exists() else {}
    for each in part or ["speed", "accuracy"]:
        described = session.describe(model=str(model))
        results = in_processes(model, rounds, new) if each == "speed" else accuracy(model, new)
        document[each] = {"run": described, "results": results}
        session.save(document)
        keys = list(results[0])
        print_table(session.console, keys, [[str(row[key]) for key in keys] for row in results], left=1, title=each)
    session.finish()


def in_processes(model: Path, rounds: int, new: int) -> list[dict[str, Any]]:
    """Measure each dtype in a process of its own, whose memory is that of one model."""
    found = []
    for dtype in DTYPES:
        arguments = ["--model", str(model), "--rounds", str(rounds), "--new", str(new), "--measure", dtype]
        arguments += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cpu_dtype", *arguments], check=True, stdout=subprocess.PIPE, text=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def speed(path: Path, dtype: str, rounds: int, new: int) -> dict[str, Any]:
    """Median seconds of a decode step in each batch, and the bytes of the process afterwards."""
    before = resident_bytes()
    model = load(path, dtype)
    engine = Engine({"m": model})
    result: dict[str, Any] = {"dtype": dtype}
    for batch in BATCHES:
        prompts = random_prompts(batch, model.vocabulary)

        def seconds(tokens: int, prompts: list[list[int]] = prompts) -> float:
            engine.weights_updated("m")  # so that no prompt is cached
            start = time.perf_counter()
            engine.generate("m", prompts, SamplingParams(max_tokens=tokens))
            return time.perf_counter() - start

        seconds(2)
        steps = [(seconds(1 + new) - seconds(1)) / new for _ in range(rounds)]
        result[f"step_{batch}"] = round(statistics.median(steps), 5)
    return result | {"model_bytes": resident_bytes() - before}


def accuracy(path: Path, new: int) -> list[dict[str, Any]]:
    """Compare log-probabilities of drawn tokens; see the module."""
    batch = drawn_batch(load(path, "float32"), new)
    exact = plain_logprobs(path, torch.float64, batch)
    found: list[dict[str, Any]] = [
        {"computed by": "transformers, bfloat16"} | errors(plain_logprobs(path, torch.bfloat16, batch), exact)
    ]
    for dtype in DTYPES:
        model = load(path, dtype)
        row: dict[str, Any] = {"computed by": f"ours, {dtype}"} | errors(
            trained_logprobs(model, batch).detach().double(), exact
        )
        if dtype != "float32":
            row["gradient cosine"] = cosine(
                gradient(model, batch), gradient(rounded_once(path, model.causal.dtype), batch)
            )
        found.append(row | sampler_difference(model, new))
        del model  # before the next one is loaded
    return [row | {key: row.get(key) for key in found[-1]} for row in found]


def sampler_difference(model: LanguageModel, new: int) -> dict[str, float]:
    """The KL of sampling from training per token (k3), and the largest difference, before and after an update."""
    model.requires_grad_(True)
    backend = TorchBackend(dict(model.causal.named_parameters()), OptimizerConfig(learning_rate=1e-5), 2)
    result = {}
    for when in ("before", "after"):
        model.weights_updated()
        tokens, drawn = draw(model, new)
        trained = trained_logprobs(model, batch_of(tokens, model.vocabulary))
        change = trained.detach().double() - torch.tensor(drawn, dtype=torch.float64)
        result[f"sampler KL {when}"] = float((change.exp() - 1 - change).mean())
        result[f"largest {when}"] = float(change.abs().max())
        if when == "before":
            backend.backward(-trained.mean())
            backend.step()
    return result


def gradient(model: LanguageModel, batch: SequenceBatch) -> list[Tensor]:
    """The gradient of the mean log-probability by all weights."""
    model.requires_grad_(True)
    trained_logprobs(model, batch).mean().backward()
    found = [weight.grad for weight in model.causal.parameters() if weight.grad is not None]
    model.causal.zero_grad(set_to_none=True)
    return found


def cosine(found: list[Tensor], expected: list[Tensor]) -> float:
    """The cosine of the angle between two gradients."""

    def product(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    return product(found, expected) / (product(found, found) * product(expected, expected)) ** 0.5


@torch.no_grad()
def rounded_once(path: Path, dtype: torch.dtype) -> LanguageModel:
    """A float32 model with the weights of one in ``dtype``."""
    model = load(path, "float32")
    for weight in model.causal.parameters():
        weight.copy_(weight.to(dtype))
    model.weights_updated()
    return model


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """The mean and the largest difference of log-probabilities, in nats."""
    difference = (found - exact).abs()
    return {"mean error": float(difference.mean()), "largest error": float(difference.max())}


def load(path: Path, dtype: str) -> LanguageModel:
    """Load a model on the CPU."""
    return load_language_model(ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": "cpu"}))


def random_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens, (count, PROMPT_TOKENS)."""
    generator = torch.Generator().manual_seed(0)
    drawn: list[list[int]] = torch.randint(5, vocabulary, (count, PROMPT_TOKENS), generator=generator).tolist()
    return drawn


def draw(model: LanguageModel, new: int) -> tuple[list[list[int]], list[float]]:
    """Draw a completion of each of four prompts; returns tokens, and the log-probabilities of all of them."""
    groups = Engine({"m": model}).generate("m", random_prompts(4, model.vocabulary), SamplingParams(max_tokens=new))
    completions = list(chain.from_iterable(groups))
    return [list(c.tokens) for c in completions], [x for c in completions for x in c.logprobs]


def drawn_batch(model: LanguageModel, new: int) -> SequenceBatch:
    """The prompts of `draw` with completions that a model draws."""
    return batch_of(draw(model, new)[0], model.vocabulary)


def batch_of(tokens: list[list[int]], vocabulary: int) -> SequenceBatch:
    """The prompts of `draw` with their completions."""
    return SequenceBatch.build(random_prompts(4, vocabulary), tokens, torch.device("cpu"))


def trained_logprobs(model: LanguageModel, batch: SequenceBatch) -> Tensor:
    """What training computes, (N,) float32."""
    head = model.head
    return linear_logprob(model.action_states(batch), head.weight, batch.targets, **head.options).logprob


@torch.no_grad()
def plain_logprobs(path: Path, dtype: torch.dtype, batch: SequenceBatch) -> Tensor:
    """What transformers computes of each sequence alone, (N,) float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    found = []
    for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def resident_bytes() -> int:
    """Resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    app()
