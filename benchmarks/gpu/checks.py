"""The smoke checks: each is a function of the device that raises if something is wrong, and returns what it found in a line.

What a check needs is imported in it, so that a package that is missing or broken fails only the checks that need it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.hardware import ROOT, gpu

if TYPE_CHECKING:
    import torch

    from alignpro.models.language_model import LanguageModel


class NotHereError(Exception):
    """A check does not apply to this machine, for the reason given."""


@dataclass(frozen=True)
class Check:
    """A check by name, and how long it may take."""

    name: str
    run: Callable[[torch.device], str]
    seconds: float = 30


def packages(device: torch.device) -> str:
    """Check that what pyproject.toml requires is installed, in versions within its ranges, and so are their own needs."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    wrong, count = [], 0
    for requirement in map(Requirement, needed):
        wrong += _unmet(requirement, "alignpro")
        count += 1
        try:
            own = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if requirement.name not in ("torch", "triton"):  # an image's torch may do without the wheels of its libraries
            wrong += [line for each in own for line in _unmet(Requirement(each), requirement.name)]
    if wrong:
        raise RuntimeError("; ".join(sorted(set(wrong))))
    return f"{count} requirements met"


def _unmet(requirement: Any, wanted_by: str) -> list[str]:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return []
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return [f"{requirement.name} is not installed ({wanted_by} needs it)"]
    if requirement.specifier.contains(version, prereleases=True):
        return []
    return [f"{requirement.name} is {version}, and {wanted_by} needs {requirement.specifier}"]


def imports(device: torch.device) -> str:
    """Import the packages that the tests and benchmarks use."""
    names = (
        "alignpro.cli",
        "alignpro.doctor",
        "alignpro.training.jobs",
        "alignpro.evaluation",
        "deepspeed",
        "datasets",
    )
    for name in names:
        importlib.import_module(name)
    return ", ".join(names)


def card(device: torch.device) -> str:
    """Multiply two matrices on the device, and compare the product with float64."""
    import torch

    left, right = torch.randn(2, 256, 256)
    product = (left.to(device) @ right.to(device)).cpu()
    torch.testing.assert_close(product.double(), left.double() @ right.double(), rtol=1e-2, atol=0.1)
    if device.type == "cpu":
        return f"torch {torch.__version__}"
    properties, known = torch.cuda.get_device_properties(device), gpu() or {}
    return (
        f"{properties.name}, {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.1f} GiB, "
        f"driver {known.get('driver')}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def rates(device: torch.device) -> str:
    """Measure the rates of a large copy and a large matrix product."""
    import torch

    from benchmarks.engine.floor import measure_rates

    if device.type == "cpu":
        raise NotHereError("the rates of a GPU")
    found = measure_rates(device, torch.bfloat16)
    return f"{found.bytes_per_s / 1e9:.0f} GB/s, {found.flops_per_s / 1e12:.0f} TFLOP/s in bfloat16"


def doctor(device: torch.device) -> str:
    """Run the probes of `alignpro doctor`; none may report a problem."""
    from alignpro.doctor import diagnose

    problems = [f"{each.name}: {each.detail}" for each in diagnose() if each.status == "problem"]
    if problems:
        raise RuntimeError("; ".join(problems))
    return "no problem"


def head(case_name: str) -> Callable[[torch.device], str]:
    """Return a check of one of the head's operators in Triton: values and gradients beside the reference in float64."""

    def check(device: torch.device) -> str:
        import torch

        from benchmarks.kernels import ours
        from benchmarks.kernels.cases import CASES
        from benchmarks.kernels.correctness import check as deviation
        from benchmarks.kernels.correctness import describe_error, expect
        from benchmarks.kernels.entrant import Setting
        from benchmarks.kernels.problem import make_heads, make_problem
        from benchmarks.kernels.shapes import Shape

        case = next(case for case in CASES if case.name == case_name)
        on_cpu = device.type == "cpu"
        shape, rows = (Shape("tiny", 16, 70), 5) if on_cpu else (Shape("small", 256, 5001), 300)
        setting = Setting(device, torch.float32 if on_cpu else torch.bfloat16, shape)
        heads = make_heads(shape, device, setting.dtype, 0, reference=case.kl == "separate")
        problem = make_problem(case, shape, heads, case.batch or rows, 1)
        found = deviation(case, ours.prepare("triton", None, case, setting), problem, expect(case, problem, setting))
        if reason := describe_error(found, setting.dtype):
            raise RuntimeError(reason)
        return ", ".join(f"{name} off by {value:.1e}" for name, value in found.items())

    return check


def attention(device: torch.device) -> str:
    """Compare attention over pages in Triton with the reference in float64: a decode step and a mixed one."""
    import torch

    from alignpro_kernels import PagedKeys, paged_attention

    on_cpu = device.type == "cpu"
    width, dtype = (16, torch.float32) if on_cpu else (128, torch.bfloat16)
    torch.manual_seed(0)
    worst = 0.0
    for counts, lengths in (([1, 1], [40, 7]), ([9, 1], [9, 30])):
        pages = torch.randn(8, 2, 16, 2, width).to(dtype)
        query = torch.randn(sum(counts), 8, width).to(dtype)
        positions = [range(length - count, length) for count, length in zip(counts, lengths, strict=True)]
        keys = {
            "cu_queries": torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32),
            "page_table": torch.tensor([[5, 0, 3], [6, 1, 7]], dtype=torch.int32),
            "key_lengths": torch.tensor(lengths, dtype=torch.int32),
            "query_positions": torch.tensor([p for each in positions for p in each], dtype=torch.int32),
            "key_starts": torch.zeros(2, dtype=torch.int32),
        }
        exact, _ = paged_attention(
            query.double(), pages.double(), PagedKeys(**keys), scale=width**-0.5, backend="reference"
        )
        there = PagedKeys(**{name: x.to(device) for name, x in keys.items()})
        out, _ = paged_attention(query.to(device), pages.to(device), there, scale=width**-0.5, backend="triton")
        worst = max(worst, float((out.cpu().double() - exact).norm() / exact.norm()))
    if not worst < 1e-2:
        raise RuntimeError(f"off by {worst:.1e}")
    return f"off by {worst:.1e}"


def merging(device: torch.device) -> str:
    """Compare the merging of partial attention with that on the CPU."""
    import torch

    from alignpro_kernels import merge_states

    outs, lses = torch.randn(3, 40, 5, 96), torch.randn(3, 40, 5) * 10
    merged = merge_states(outs.to(device), lses.to(device)).cpu()
    torch.testing.assert_close(merged, merge_states(outs, lses))
    return "3 parts"


def pages(device: torch.device) -> str:
    """Write keys and values into pages and copy pages, and read them back."""
    import torch

    from alignpro_kernels import copy_pages, read_kv, write_kv
    from alignpro_kernels.pages import load_kernels

    keys, values = torch.randn(2, 5, 2, 16, device=device)
    arena = torch.zeros(6, 2 * 4 * 2 * 16 * 4, dtype=torch.uint8, device=device)
    layer = arena.view(torch.float32).unflatten(1, (2, 4, 2, 16))
    slots = torch.tensor([3, -1, 22, 8, 9], device=device)
    write_kv(keys, values, layer, slots)
    copy_pages(arena, torch.tensor([5], device=device), torch.tensor([1], device=device))
    read, _ = read_kv(layer, torch.tensor([3, 6, 8], device=device))
    if not torch.equal(read, keys[[0, 2, 3]]):
        raise RuntimeError("other keys were read than written")
    if device.type == "cpu":
        return "read as written"
    load_kernels()  # raises if the CUDA kernels could not be built, in whose place PyTorch ran
    return "read as written, by the CUDA kernels"


def flash_attn(device: torch.device) -> str:
    """Name the libraries of FlashAttention that can run here: the packages, and PyTorch's own."""
    from alignpro_kernels import flash_attention, varlen_kernels

    if (reason := flash_attention.unavailable()) is not None:
        raise NotHereError(reason)
    return ", ".join(kernels.name for kernels in varlen_kernels.available())


def _model(device: torch.device) -> LanguageModel:
    from alignpro.models.language_model import LanguageModel
    from benchmarks.models import make_chat_template, make_model, make_tokenizer
    from benchmarks.workload import BYTES, ModelShape

    model = make_model(ModelShape(2, 64, 128, 4, 2, BYTES), context=128, seed=0, device=device)
    return LanguageModel(model, make_tokenizer(make_chat_template("", "")), "target").requires_grad_(False)


def _prompts() -> list[list[int]]:
    return [list(range(3, 3 + length)) for length in (5, 17, 40)]


def generation(device: torch.device) -> str:
    """Generate without graphs; every log-probability must be that of a pass of transformers over the sequence."""
    import torch

    from alignpro.engine import Engine, SamplingParams

    model = _model(device)
    groups = Engine({"target": model}, cuda_graphs=False).generate("target", _prompts(), SamplingParams(max_tokens=8))
    worst = 0.0
    for prompt, (drawn,) in zip(_prompts(), groups, strict=True):
        if drawn.error:
            raise RuntimeError(drawn.error)
        ids = torch.tensor([prompt + drawn.tokens], device=device)
        with torch.no_grad():
            logprobs = model.causal(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).cpu()
        expected = logprobs.gather(1, torch.tensor(drawn.tokens)[:, None])[:, 0]
        worst = max(worst, float((torch.tensor(drawn.logprobs).double() - expected).abs().max()))
    if not worst < 1e-2:
        raise RuntimeError(f"log-probabilities are off by {worst:.1e}")
    return f"log-probabilities off by {worst:.1e}"


def graphs(device: torch.device) -> str:
    """Generate with CUDA graphs, also after an update of the weights; tokens must be those of the padded path."""
    from alignpro.engine import Engine, SamplingParams

    on_cpu = device.type == "cpu"
    model, params = _model(device), SamplingParams(max_tokens=12, n=2, seed=1)
    captured, padded = (
        Engine({"target": model}, cuda_graphs=how, audit=True) for how in ("padded" if on_cpu else True, "padded")
    )
    for _ in range(2):
        drawn, expected = (
            [one.tokens for group in engine.generate("target", _prompts(), params) for one in group]
            for engine in (captured, padded)
        )
        if drawn != expected:
            raise RuntimeError("tokens differ from those of the padded path")
        for engine in (captured, padded):
            engine.weights_updated("target")
    counts = captured.stats.decode_ticks
    if not on_cpu and not counts["replayed"]:
        raise RuntimeError(f"no pass was replayed: {dict(counts)}")
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def async_scheduling(device: torch.device) -> str:
    """Generate with each pass launched before the tokens before it are known; tokens must be those of passes that wait."""
    from alignpro.engine import Engine, SamplingParams

    on_cpu = device.type == "cpu"
    model, params = _model(device), SamplingParams(max_tokens=24, n=2, seed=1, stop_token_ids=tuple(range(40, 48)))
    wasted = 0.0
    for graphs in (False, "padded" if on_cpu else True):
        ahead, waiting = (
            Engine({"target": model}, cuda_graphs=graphs, async_scheduling=how, audit=True) for how in (True, False)
        )
        for _ in range(3):  # eagerly, captured and replayed
            drawn, expected = (
                [one.tokens for group in engine.generate("target", _prompts(), params) for one in group]
                for engine in (ahead, waiting)
            )
            if drawn != expected:
                raise RuntimeError(f"tokens differ from those of passes that wait (cuda_graphs={graphs})")
            ahead.release()
        if not ahead.stats.computed["wasted"]:
            raise RuntimeError("no sequence was computed beyond its end: no pass was launched ahead")
        wasted += ahead.stats.computed["wasted"]
    return f"the same tokens, {wasted:.0f} rows in vain"


def training(device: torch.device) -> str:
    """Make two training steps of tiny models in one process."""
    import math
    import tempfile
    from pathlib import Path

    from benchmarks.training.ours import OurTraining
    from benchmarks.training.task import make_task
    from benchmarks.workload import QUICK

    with tempfile.TemporaryDirectory(prefix="alignpro-smoke-") as directory:
        ours = OurTraining(make_task(QUICK, Path(directory), steps=2, seed=0), device)
        tokens = [ours.step(index) for index in range(2)][-1].tokens
    if not all(math.isfinite(count) and count > 0 for name, count in tokens.items() if name != "recompute"):
        raise RuntimeError(f"tokens: {tokens}")
    return ", ".join(f"{name} {count}" for name, count in tokens.items())


def zero3(device: torch.device) -> str:
    """Make two training steps of tiny models with DeepSpeed's ZeRO-3 on one rank."""
    import tempfile
    from pathlib import Path

    from benchmarks.distributed.job import Job
    from benchmarks.distributed.launch import launch
    from benchmarks.training.task import make_task
    from benchmarks.workload import QUICK

    if device.type == "cpu":
        raise NotHereError("on a CPU, DeepSpeed first compiles its collectives")
    with tempfile.TemporaryDirectory(prefix="alignpro-smoke-") as directory:
        root = Path(directory)
        task = make_task(QUICK, root, steps=2, seed=0)
        (rank,) = launch(Job(task, ["z3"], "cuda", 1, [], False, root / "out"), 1)
    return f"{len(rank['z3']['steps'])} steps"


def huggingface(device: torch.device) -> str:
    """Generate with transformers, the peer of the engine's benchmark."""
    import torch

    from benchmarks.engine.cases import CASES, make_inputs, shrink
    from benchmarks.engine.entrant import Setting
    from benchmarks.engine.peers import entrants

    case = shrink(next(case for case in CASES if case.name == "single"))
    (peer,) = (entrant for entrant in entrants() if entrant.name == "hf-generate")
    setting = Setting(device, torch.float32, 8, 0)
    generated = peer.prepare(case, make_inputs(case, 0), setting)(0)
    if generated.tokens != case.expected:
        raise RuntimeError(f"generated {generated.tokens} instead of {case.expected}")
    return f"{generated.tokens['target']} tokens"


CHECKS: Sequence[Check] = (
    Check("packages", packages),
    Check("card", card),
    Check("imports", imports, 60),
    Check("pages", pages, 60),
    Check("head: log-probability", head("logprob"), 60),
    Check("head: policy loss", head("policy"), 60),
    Check("head: policy loss with KL", head("policy-kl"), 60),
    Check("head: sampling", head("sample-8"), 60),
    Check("attention", attention),
    Check("merging", merging),
    Check("flash-attn", flash_attn),
    Check("generation", generation),
    Check("graphs", graphs),
    Check("async scheduling", async_scheduling),
    Check("training step", training, 45),
    Check("ZeRO-3 step", zero3, 70),
    Check("transformers", huggingface),
    Check("rates", rates),
    Check("doctor", doctor, 60),
)
