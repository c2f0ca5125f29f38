"""Past rewrites are remembered alike on all ranks, whichever of them sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from thread_ranks import results, run_ranks

from alignpro.config import MemoryConfig
from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.environments.base import Scores
from alignpro.prompting.memory import FILE_NAME, Memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.training.step_memory import StepMemory


def scores(places: list[int]) -> Scores:
    values = torch.tensor([[place / 8, place / 16] for place in places])
    return Scores(values.view(-1, 2), [[f"rewrite {place}", f"other {place}"] for place in places])


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_remember_the_same_whichever_of_them_sampled(tmp_path: Path, size: int) -> None:
    batch = [Prompt.from_text(f"prompt number {i}") for i in range(5)]
    expected = Memory(MemoryConfig(size=4))
    whole = scores(list(range(5)))
    expected.add(3, batch, whole.samples, whole.values.tolist())

    def remember(ranks: Ranks) -> tuple[bytes, dict[str, float]]:
        local = list(range(5))[ranks.rank :: ranks.size]
        made = StepMemory(ranks, MemoryContext(Memory(MemoryConfig(size=4)), 100), tmp_path)
        metrics = made.add(2, batch, local, [batch[i] for i in local], scores(local))
        return made.memory.dumps(), metrics

    outcomes = run_ranks(size, remember)
    for content, metrics in results(outcomes):
        assert content == expected.dumps() == (tmp_path / FILE_NAME).read_bytes()
        assert metrics == {"memory/prompts": 4, "memory/rewrites": 8, "memory/shown": 0}
    assert [call.dtype for call in outcomes[0].calls].count(torch.uint8) == 3  # as docs/launch.md tells
