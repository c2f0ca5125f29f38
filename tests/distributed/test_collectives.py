"""Every rank issues the same collectives, at any world size, whatever its share of a step is; their number is documented.

The ranks are threads here (`thread_ranks`); `test_forked_ranks.py` compares what processes issue under DeepSpeed.
"""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data_parallel import BACKEND, DrawnWorld, training
from thread_ranks import Call, Outcome, results, run_ranks

from alignpro.config import TrainConfig, validate_config
from alignpro.data import Prompt
from alignpro.distributed.phases import PhaseStore
from alignpro.distributed.ranks import Ranks, is_collective_failure
from alignpro.distributed.sharding.partition import Partition
from alignpro.engine import Chain, Completion
from alignpro.environments.base import Scores, refuse_errors
from alignpro.errors import CheckpointError, Interrupted, PeerError, TrainingError
from alignpro.training import run as run_module
from alignpro.training.metrics import EXECUTION_METRICS, Metrics
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.rollouts import FILE_NAME, SamplingAhead
from alignpro.training.run import Run

LAUNCH = Path(__file__).parents[2] / "docs" / "launch.md"
PPO = {"loss": "ppo_clip", "advantage": "gae", "minibatches": 3, "epochs": 2}
GIBBS = {"loss": "gibbs"}
DISTILLATION = {"loss": "distillation", "minibatches": 3, "epochs": 2}


def trained(
    worlds: Sequence[DrawnWorld], prompts: int, objective: dict[str, Any], out: Path, micro_batch_size: int = 2
) -> Callable[[Ranks], tuple[list[Metrics], list[torch.Tensor]]]:
    """Return a rank's work: a step and an evaluation, of which it returns the metrics and the weights."""

    def work(ranks: Ranks) -> tuple[list[Metrics], list[torch.Tensor]]:
        trainer = training(worlds[ranks.rank], ranks, prompts, objective, out=out, micro_batch_size=micro_batch_size)
        metrics = [trainer.step(0), trainer.evaluate(0).metrics]
        return metrics, [weight.detach() for weight in trainer.policy.trainable.values()]

    return work


@pytest.mark.parametrize(
    ("size", "prompts", "objective", "micro_batch_size"),
    [
        pytest.param(3, 5, PPO, 2, id="3 ranks, PPO with a critic"),
        pytest.param(5, 7, GIBBS, 2, id="5 ranks, Gibbs"),
        pytest.param(5, 7, DISTILLATION, 2, id="5 ranks, distillation"),
        pytest.param(16, 21, {}, 4, id="16 ranks"),
        pytest.param(64, 70, {}, 4, id="64 ranks", marks=pytest.mark.slow),
    ],
)
def test_all_ranks_issue_the_same_and_agree_with_one_process(
    size: int, prompts: int, objective: dict[str, Any], micro_batch_size: int, tmp_path: Path
) -> None:
    """Ranks have one or two prompts, some minibatches none, and at most two of them a prompt of the evaluation."""
    settings = (prompts, objective, tmp_path, micro_batch_size)
    made = results(run_ranks(size, trained([DrawnWorld() for _ in range(size)], *settings)))
    expected, weights = trained([DrawnWorld()], *settings)(Ranks())
    for metrics, own in made:
        for row, expected_row in zip(metrics, expected, strict=True):
            assert row.keys() == expected_row.keys()
            for name in row:
                if not name.startswith(EXECUTION_METRICS):
                    assert row[name] == pytest.approx(expected_row[name], rel=1e-5, abs=1e-6), name
        for weight, other in zip(own, weights, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-9)


def test_ranks_draw_their_own_prompts_ahead_and_agree_with_one_process(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> tuple[list[Metrics], list[list[Chain]]]:
        world, out = DrawnWorld(), tmp_path / str(ranks.size)
        trainer = training(world, ranks, 5, {}, out=tmp_path, ahead=SamplingAhead(world.begin_rollout))
        rows = [trainer.step(0), trainer.step(1)]
        if ranks.is_rank_zero:
            out.mkdir()
        ranks.barrier()
        trainer.rollouts.save(out)
        ranks.barrier()
        trainer.rollouts.load(out)
        return rows, trainer.rollouts(2).chains

    ((expected, _),) = results(run_ranks(1, work))
    made = results(run_ranks(3, work))
    for rows, _ in made:
        for row, expected_row in zip(rows, expected, strict=True):
            assert row.keys() == expected_row.keys()
            for name in row:
                if not name.startswith(EXECUTION_METRICS):
                    assert row[name] == pytest.approx(expected_row[name], rel=1e-5, abs=1e-6), name
    one, three = (json.loads((tmp_path / size / FILE_NAME).read_text()) for size in ("1", "3"))
    assert [row["samples"] for row in one] == [row["samples"] for row in three]
    assert sum(len(chains) for _, chains in made) == 5


def counted(calls: Sequence[Call]) -> dict[str, Counter[str]]:
    """Count, by phase, what `Ranks` issues: numbers that are reduced, and objects that are gathered, each in two calls."""
    found: dict[str, Counter[str]] = {}
    for call in calls:
        if not call.phase.startswith(BACKEND) and not (call.kind == "all_gather" and call.dtype == torch.int64):
            kind = "gathered" if call.dtype == torch.uint8 else "reduced"
            found.setdefault(call.phase, Counter())[kind] += 1
    return found


def test_the_number_of_collectives_is_documented_and_independent_of_the_number_of_prompts(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|", LAUNCH.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 4
    documented = {
        f"step 1, {phase}": {name: int(n) for name, n in (("reduced", reduced), ("gathered", gathered)) if int(n)}
        for phase, reduced, gathered in rows
    }
    for prompts in (4, 13):
        outcomes = run_ranks(4, trained([DrawnWorld() for _ in range(4)], prompts, {"step_kl": 1e3}, tmp_path))
        results(outcomes)
        made = counted(outcomes[0].calls)
        assert {phase: dict(made[phase]) for phase in documented} == documented, prompts


def test_what_is_gathered_does_not_grow_with_the_length_of_samples() -> None:
    """A column of a matrix is sent alone, not with the storage of the matrix."""

    def work(ranks: Ranks) -> None:
        for width in (1, 1000):
            ranks.phase = str(width)
            assert ranks.all_gather({"": torch.zeros(8, width)[:, 0]})[""].shape == (16,)

    outcomes = run_ranks(2, work)
    results(outcomes)
    sent = {call.phase: call.shape for call in outcomes[0].calls if call.dtype == torch.uint8}
    assert sent["1"] == sent["1000"]


def test_weights_of_fewer_bytes_than_ranks_are_gathered_whole() -> None:
    """Most ranks hold nothing but padding; all take part."""

    def work(ranks: Ranks) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(torch.arange(n, dtype=dtype), False) for n, dtype in SHAPES]
        partition = Partition(weights, torch.device("cpu"), ranks.rank, ranks.size)
        partition.gather(partition.allocate())
        return [weight.data.clone() for weight in weights]

    for gathered in results(run_ranks(64, work)):
        for weight, (n, dtype) in zip(gathered, SHAPES, strict=True):
            assert torch.equal(weight, torch.arange(n, dtype=dtype))


SHAPES = [(3, torch.bfloat16), (0, torch.float32), (40, torch.float32), (1, torch.float64)]


def test_the_phases_of_the_other_ranks_are_told_in_few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def work(ranks: Ranks) -> str:
        phases = PhaseStore(ranks)
        assert ranks.on_phase is not None
        ranks.on_phase("step 3, rollout")  # not `enter_phase`: the group compares the phases of collectives
        ranks.barrier()
        if ranks.rank != 3:
            ranks.on_phase("step 3, reward")
        ranks.barrier()
        told = phases.describe_peers()
        ranks.barrier()  # rank 0 hosts the store
        return told

    told = results(run_ranks(7, work))
    assert told[1] == "rank 3 entered step 3, rollout 0 s ago; ranks 0, 2, 4-6 entered step 3, reward 0 s ago"
    assert told[3] == "ranks 0-2, 4-6 entered step 3, reward 0 s ago"


# ------------------------------------------------------------------------------------------------------------- failures


class FailingWorld(DrawnWorld):
    """A world on one rank of which something fails: ``how`` says what, on which rank."""

    how, rank = "", -1

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        if dist.get_rank() == self.rank:
            if self.how == "raise":
                raise RuntimeError("the judge is out")
            if self.how == "refuse":  # the target, every rewrite of this rank
                failed = Completion([1], [0.0], "length", error="the rewrite does not fit")
                refuse_errors(prompts, [[Chain(failed)] * 2] * len(prompts))
            if self.how == "memory":
                raise torch.OutOfMemoryError("no memory")
            if self.how == "die":
                raise KeyboardInterrupt
        return super().score(prompts, chains)


def failing(size: int, how: str, rank: int, out: Path) -> list[Outcome]:
    """Run a step in which something fails on one rank; each returns whether it takes the error as one of all ranks."""

    def world() -> FailingWorld:
        made = FailingWorld()
        made.how, made.rank = how, rank
        return made

    worlds = [world() for _ in range(size)]

    def work(ranks: Ranks) -> tuple[BaseException, bool, bool]:
        trainer = training(worlds[ranks.rank], ranks, size + 2, {}, out=out)
        before = [weight.detach().clone() for weight in trainer.policy.trainable.values()]
        with pytest.raises(BaseException) as caught:
            trainer.step(0)
        same = all(map(torch.equal, before, trainer.policy.trainable.values()))
        return caught.value, ranks.raised_on_all(caught.value), same

    return run_ranks(size, work)


@pytest.mark.parametrize(("how", "kind"), [("raise", RuntimeError), ("refuse", TrainingError)])
def test_an_error_on_one_rank_ends_the_step_on_all_at_the_same_point(
    how: str, kind: type[Exception], tmp_path: Path
) -> None:
    made = results(failing(4, how, 2, tmp_path))
    for rank, (error, together, same) in enumerate(made):
        assert type(error) is (kind if rank == 2 else PeerError)
        assert together and same
        assert rank == 2 or str(error).startswith("rank 2: ")


def test_a_lost_rank_is_a_failure_of_a_collective_on_the_others(tmp_path: Path) -> None:
    outcomes = failing(5, "die", 3, tmp_path)
    for rank, outcome in enumerate(outcomes):
        error, together, same = outcome.result
        assert isinstance(error, KeyboardInterrupt) if rank == 3 else is_collective_failure(error)
        assert not together and same


def test_a_translated_error_of_all_ranks_is_still_one_of_all() -> None:
    def work(ranks: Ranks) -> list[bool]:
        found = []
        for own in (True, False):
            try:
                with ranks.raise_together():
                    if ranks.rank == 1:
                        raise OSError("disk full")
            except (OSError, PeerError) as error:
                translated = CheckpointError("cannot be written")
                translated.__cause__ = error if own else None
                found.append(ranks.raised_on_all(translated))
        return found

    assert results(run_ranks(3, work)) == [[True, False]] * 3


# ------------------------------------------------------------------------------------------------------------- the run


def run_of_ranks(
    size: int,
    out: Path,
    work: Callable[[Run, RLTrainer], None],
    how: str = "",
    rank: int = -1,
    objective: dict[str, Any] | None = None,
    **run: Any,
) -> list[Outcome]:
    """Open a run on some ranks and call ``work`` with it and its trainer."""
    model = {"path": "none"}
    sections = {"policy": model, "target": model, "reward": {"components": [{"kind": "function", "function": "a:b"}]}}
    settings = {"out": out, "steps": 2, "checkpoint_every": 1, "eval_every": 1, "tensorboard": False} | run
    config = validate_config(TrainConfig, {"run": settings, "data": {"source": "none.jsonl"}, **sections})
    worlds = [FailingWorld() for _ in range(size)]
    for world in worlds:
        world.how, world.rank = how, rank

    def one(ranks: Ranks) -> None:
        trainer = training(worlds[ranks.rank], ranks, size + 1, objective or {}, out=out)
        trainer.export = lambda directory: None  # type: ignore[method-assign]  # the world's tokenizer has no files
        with Run(config, ranks=ranks) as opened:
            work(opened, trainer)

    return run_ranks(size, one)


def test_a_run_evaluates_saves_and_ends_together(tmp_path: Path) -> None:
    outcomes = run_of_ranks(5, tmp_path / "run", lambda run, trainer: run.train(trainer))
    results(outcomes)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    assert sorted(path.name for path in checkpoint.glob("random*")) == [
        "random.pt",
        *(f"random_{rank}.pt" for rank in range(1, 5)),
    ]


def test_a_rank_that_cannot_write_its_part_names_the_checkpoint(tmp_path: Path) -> None:
    def work(run: Run, trainer: RLTrainer) -> None:
        def failing_save(directory: Path, name: str) -> None:
            raise OSError(28, "No space left on device")

        if run.ranks.rank == 2:  # the policy's part; the critic's would follow
            trainer.backend.save = failing_save  # type: ignore[method-assign]
        with pytest.raises((CheckpointError, PeerError)) as caught:
            run.train(trainer)
        assert run.ranks.raised_on_all(caught.value)
        raise caught.value

    outcomes = run_of_ranks(4, tmp_path / "run", work, objective=PPO)
    assert len({outcome.calls for outcome in outcomes}) == 1
    assert [type(outcome.error) for outcome in outcomes] == [PeerError, PeerError, CheckpointError, PeerError]
    message = str(outcomes[2].error)
    assert "step_000001: cannot be written" in message and "No space left" in message and "make room" in message
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_lack_of_memory_on_one_rank_is_reported_by_it_and_the_others_wait_for_nothing(tmp_path: Path) -> None:
    def work(run: Run, trainer: RLTrainer) -> None:
        with pytest.raises((TrainingError, PeerError)) as caught:
            run.train(trainer)
        assert run.ranks.raised_on_all(caught.value)
        raise caught.value

    outcomes = run_of_ranks(4, tmp_path / "run", work, how="memory", rank=1)
    assert [type(outcome.error) for outcome in outcomes] == [PeerError, TrainingError, PeerError, PeerError]
    assert "lower optimizer.micro_batch_size" in str(outcomes[1].error)
    assert len({outcome.calls for outcome in outcomes}) == 1


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def signals(*, patience: float) -> Iterator[list[int]]:
        yield [signal.SIGTERM] if dist.get_rank() == 3 else []

    monkeypatch.setattr(run_module, "stop_signals", signals)
    outcomes = run_of_ranks(5, tmp_path / "run", lambda run, trainer: run.train(trainer), steps=4, eval_every=0)
    assert all(isinstance(outcome.error, Interrupted) for outcome in outcomes)
    assert len({outcome.calls for outcome in outcomes}) == 1
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
