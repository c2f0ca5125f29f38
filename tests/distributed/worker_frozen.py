"""The program of a test's ranks: a sharded target and reward model, with unequal work on the two ranks."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignpro.config import ModelConfig, ModelRewardConfig
from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.distributed.session import distributed_session
from alignpro.distributed.sharding.frozen import FrozenModels, ShardedModels
from alignpro.engine import Engine, SamplingParams
from alignpro.errors import AlignProError
from alignpro.models.loading import load_language_model
from alignpro.rewards.model import ModelReward

PROMPTS = [[5, 6, 7, 8, 9, 10], [7, 8], [9, 10, 11], [5, 6, 12]]
PARAMS = SamplingParams(max_tokens=6, n=2)


class Pair:
    """A target and a reward model, and calls of both."""

    def __init__(self, root: Path, models: FrozenModels) -> None:
        self.models = models
        target = ModelConfig(path=str(root / "target"), device="cpu")
        reward = ModelConfig(path=str(root / "reward"), device="cpu")
        self.target = models.load(target, load_language_model)
        self.reward = ModelReward(ModelRewardConfig(kind="model", model=reward, batch_size=1), models.load)

    def generate(self, prompts: list[list[int]]) -> list[Any]:
        """Return tokens and log-probabilities. Each call makes a new engine, so that no prompt is cached."""
        groups = Engine({"target": self.target}).generate("target", prompts, PARAMS)
        return [[each.tokens, each.logprobs] for group in groups for each in group]

    def score(self, responses: list[str]) -> list[float]:
        """Return the scores, with one forward pass per response."""
        return self.reward([Prompt.from_text("sort")] * len(responses), responses).values


def raised(call: Callable[[], object]) -> str:
    """Return the error that a call raises."""
    try:
        call()
    except (AlignProError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it must raise an error")


def run(ranks: Ranks, root: Path) -> dict[str, Any]:
    """Return this rank's results, the expected results, and the memory that it held."""
    whole, sharded = Pair(root, FrozenModels()), Pair(root, models := ShardedModels(ranks))
    weights = list(sharded.target.parameters())
    present = count_present(sharded.target.causal.base_model.layers)
    works: list[Callable[[Pair], Any]] = [
        lambda pair: pair.generate(PROMPTS[: 4 - 4 * ranks.rank]),  # no prompts on rank 1
        lambda pair: pair.generate(PROMPTS[: 1 + 2 * ranks.rank]),
        lambda pair: pair.score(["a", "bb", "ccc"][: 3 * ranks.rank]),
        # The ranks call the models in different orders.
        lambda pair: (
            [pair.score(["a", "b"]), pair.generate(PROMPTS)]
            if ranks.is_rank_zero
            else [pair.generate(PROMPTS[:1]), pair.score(["a"])]
        ),
    ]
    between = [sum(weight.numel() for weight in weights)]
    got = []

    def use(work: Callable[[Pair], Any], broken: nn.Module | None = None) -> None:
        with models.materialized(), ranks.raise_together(), raising(broken):
            got.append(work(sharded))

    for work in works:
        use(work)
        between.append(sum(weight.numel() for weight in weights))

    def fail_on_rank_1(pair: Pair) -> Any:
        if ranks.rank == 1:
            raise RuntimeError("the judge is out")
        return pair.generate(PROMPTS)

    told = raised(lambda: use(fail_on_rank_1))
    # A forward pass raises halfway on one rank. The engine repeats it, and later calls are unaffected.
    use(lambda pair: pair.generate(PROMPTS[: 1 + ranks.rank]), sharded.target if ranks.rank == 1 else None)
    failing = sharded.reward._model if ranks.rank == 1 else None
    broken_pass = raised(lambda: use(lambda pair: pair.score(["a", "b"]), failing))
    use(lambda pair: pair.score(["a"]))
    expected = [work(whole) for work in works] + ([whole.generate(PROMPTS)] if ranks.is_rank_zero else [])
    expected.append(whole.generate(PROMPTS[: 1 + ranks.rank]))
    expected += ([whole.score(["a", "b"])] if ranks.is_rank_zero else []) + [whole.score(["a"])]
    return {
        "got": got,
        "expected": expected,
        "between": between,
        "held": models.held_bytes,
        "whole": sum(weight.nbytes for pair in (whole.target, whole.reward._model) for weight in pair.parameters()),
        "layers present": max(present),
        "told": told,
        "broken pass": broken_pass,
    }


def too_big(ranks: Ranks) -> str:
    """Return the error where rank 1 lacks the memory for a whole model."""
    models = ShardedModels(ranks)
    models.load(ModelConfig(path="big", device="cpu"), lambda _: nn.Linear(4096, 4096))  # 64 MiB
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if ranks.rank == 1:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), limits[1]))
    message = raised(lambda: ExitStack().enter_context(models.materialized()))
    resource.setrlimit(resource.RLIMIT_AS, limits)
    return message


def count_present(layers: nn.ModuleList) -> list[int]:
    """Return a list that records, as each layer runs, how many layers have their weights."""
    present: list[int] = []

    def count(*_: Any) -> None:
        present.append(sum(all(weight.numel() for weight in layer.parameters()) for layer in layers))

    for layer in layers:
        layer.self_attn.register_forward_pre_hook(count)
    return present


@contextmanager
def raising(model: nn.Module | None) -> Iterator[None]:
    """Make the second layer of a model raise in its second forward pass."""
    if model is None:
        yield
        return
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    passes = []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("out of order")

    with layers[1].register_forward_pre_hook(fail):
        yield
    assert len(passes) >= 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[-1])
    with distributed_session(60.0) as group:
        result = run(group, root)
        result["too big"] = too_big(group)
        result["numbers"] = {
            "sum": group.sum(2.0**40 + 0.5 * group.rank),
            "max": group.reduce_max(-3 - group.rank),
        }
        (root / f"{group.rank}.json").write_text(json.dumps(result))
