"""A job's processes, from their first word to their last: joining them, and ending all when one ends.

The ``deepspeed`` launcher (or any that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts one process
a device. It ends the others when one ends with an error, so a rank that fails alone only has to say why and go.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from alignpro.distributed.board import Board
from alignpro.distributed.build import use_own_ninja
from alignpro.distributed.launcher_watch import stop_with_launcher
from alignpro.distributed.ranks import PeerError, Ranks, lost_ranks
from alignpro.errors import AlignProError, ConfigError, Interrupted, TrainingError

logger = logging.getLogger(__name__)

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def process_group(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the other ranks, for as long as the context lasts.

    Left by an error that all ranks share (see `Ranks.together`), by `Interrupted` or without one, it waits for all and
    takes the group down. Left by an error of this rank alone, there is nobody to wait for: it prints the error and ends
    the process, whereupon the launcher ends the others. A launcher that ends first is a SIGTERM to this process.

    Args:
        timeout_seconds: How long a collective may wait.

    Raises:
        ConfigError: The launcher's environment is not whole.
        TrainingError: This is the first rank, and it has not found the others in time; `PeerError` on one that has told so.
    """
    if missing := [name for name in _NEEDED if name not in os.environ]:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, and {', '.join(missing)} not: start with the deepspeed launcher, or unset them"
        )
    stop_with_launcher()
    use_own_ninja()
    import deepspeed  # two seconds, and not every installation has it
    from deepspeed.accelerator import get_accelerator

    timeout = timedelta(seconds=timeout_seconds)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with _joining(timeout_seconds):
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
        ranks = Ranks(dist.new_group(backend="gloo", timeout=timeout))
        board = Board(ranks)
        _unlink_shared_memory(ranks)
    try:
        yield ranks
    except BaseException as error:
        if not isinstance(error, Interrupted) and not ranks.agreed_on(error):
            board.leave(_describe(error, ranks, board))
        if isinstance(error, AlignProError) and not isinstance(error, PeerError) and not ranks.first:
            print(f"error: rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
            raise PeerError(str(error)) from error
        raise
    finally:
        dist.barrier(ranks.group)
        dist.destroy_process_group()


def _unlink_shared_memory(ranks: Ranks) -> None:
    """Take away the name of the memory that DeepSpeed's collectives on a CPU share, once all ranks have it mapped.

    DeepSpeed never does: 66 MiB a rank would stay in /dev/shm when the job has ended. Without a name it goes with the
    processes, however they end.
    """
    dist.barrier(ranks.group)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{ranks.rank}").unlink(missing_ok=True)


@contextmanager
def _joining(timeout_seconds: float) -> Iterator[None]:
    """Say that ranks do not find each other."""
    try:
        yield
    except RuntimeError as error:
        if not lost_ranks(error):
            raise
        problem = (
            f"rank {os.environ['RANK']} has not found the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {timeout_seconds:.0f} s ({str(error).splitlines()[0]}): see that all are started and reach that address; "
            "where they only take longer to start, raise deepspeed.timeout_seconds"
        )
        if os.environ["RANK"] == "0":
            raise TrainingError(problem) from error
        print(f"error: {problem}", file=sys.stderr, flush=True)  # the command line prints those of the first rank
        raise PeerError(problem) from error


def _describe(error: BaseException, ranks: Ranks, board: Board) -> str:
    """What befell this rank and no other."""
    if isinstance(error, AlignProError):
        return f"rank {ranks.rank}: {error}"
    if lost_ranks(error):
        reason = str(error).splitlines()[0]
        return (
            f"rank {ranks.rank} waited for the others in {ranks.doing}, in vain ({reason}): {board.others()}; "
            "--resume continues from the last checkpoint"
        )
    return f"rank {ranks.rank}, in {ranks.doing}:\n{''.join(traceback.format_exception(error))}"
