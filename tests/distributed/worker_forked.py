"""The program of a test's ranks: commands of `alignpro train`, whose collectives are recorded.

The directory named last holds ``cases.json``, a list of cases: the arguments of `alignpro train`, and the rank, if any,
that cannot write files. Each rank writes ``rank_N.json``: for each case, what it has issued and the error that ended it.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alignpro.distributed.session import distributed_session
from alignpro.errors import AlignProError
from alignpro.training.jobs import train

RECORDED = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class Recorder:
    """Records the calls of torch.distributed's functions: phase, name, group, shapes and dtypes."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.phase: Callable[[], str] = lambda: ""
        for name in RECORDED:
            setattr(dist, name, self._recorded(name, getattr(dist, name)))

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            given = [*arguments, *options.values()]
            tensors = [each for each in given if isinstance(each, torch.Tensor)]
            group = next((each for each in given if isinstance(each, dist.ProcessGroup)), dist.group.WORLD)
            shown = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in tensors)
            self.calls.append([self.phase(), name, dist.get_backend(group) + str(group.group_name), shown])
            return function(*arguments, **options)

        return call


def run_rank(directory: Path) -> None:
    torch.set_num_threads(1)
    recorder, outcomes = Recorder(), []
    with distributed_session(60.0) as ranks:
        recorder.phase = lambda: ranks.phase
        own = ranks.group
        for case in json.loads((directory / "cases.json").read_text()):
            recorder.calls.clear()
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            if case["disk_full_on"] == ranks.rank:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
            error = None
            try:
                train(case["arguments"], ranks=ranks)
            except AlignProError as raised:
                error = [type(raised).__name__, str(raised), ranks.raised_on_all(raised)]
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            calls = [
                [*call[:2], "own" if call[2].endswith(str(own.group_name)) else "DeepSpeed", call[3]]
                for call in recorder.calls
            ]  # type: ignore[union-attr]
            outcomes.append({"calls": calls, "error": error})
    (directory / f"rank_{ranks.rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    run_rank(Path(sys.argv[-1]))
