"""The lifetime of a job's process group: joining it, leaving it, and ending all processes when one fails.

The ``deepspeed`` launcher (or any that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) starts one process
per device. When one exits with an error, it ends the others, so a rank that fails alone only has to say why and exit.
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

from alignpro.distributed.deepspeed.compilation import compile_operators
from alignpro.distributed.launcher_watch import stop_with_launcher
from alignpro.distributed.phases import PhaseStore
from alignpro.distributed.ranks import Ranks, is_collective_failure
from alignpro.errors import AlignProError, ConfigError, Interrupted, PeerError, TrainingError

logger = logging.getLogger(__name__)

_REQUIRED_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def distributed_session(timeout_seconds: float) -> Iterator[Ranks]:
    """Join the other ranks for the duration of the context.

    Without an error, on `Interrupted`, or on an error that all ranks raise (see `Ranks.raise_together`), the exit waits for all
    ranks and destroys the group. On an error of this rank alone it does not wait: it prints the error and ends the
    process, upon which the launcher ends the others. If the launcher ends first, this process receives a SIGTERM.

    Args:
        timeout_seconds: How long a collective may wait.

    Raises:
        ConfigError: The launcher's environment variables are incomplete, or DeepSpeed's collectives cannot be compiled.
        TrainingError: This is rank 0, and it has not found the others in time.
        PeerError: This is another rank, which has not found the others in time and has printed so.
    """
    if missing := [name for name in _REQUIRED_VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}: start with the deepspeed launcher, or unset them"
        )
    stop_with_launcher()
    compile_operators(offload=False)
    import deepspeed  # takes two seconds to import, and is optional
    from deepspeed.accelerator import get_accelerator

    timeout = timedelta(seconds=timeout_seconds)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with _joining(timeout_seconds):
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
        ranks = Ranks(dist.new_group(backend="gloo", timeout=timeout))
        phases = PhaseStore(ranks)
        _unlink_shared_memory(ranks)
    try:
        yield ranks
    except BaseException as error:
        if not isinstance(error, Interrupted) and not ranks.raised_on_all(error):
            phases.abort(_describe(error, ranks, phases))
        if isinstance(error, AlignProError) and not isinstance(error, PeerError) and not ranks.is_rank_zero:
            print(f"error: rank {ranks.rank}: {error}", file=sys.stderr, flush=True)
            raise PeerError(str(error)) from error
        raise
    finally:
        ranks.barrier()
        phases.leave()  # before the group ends: rank 0 hosts its store as well
        dist.destroy_process_group()


def _unlink_shared_memory(ranks: Ranks) -> None:
    """Unlink the shared memory of DeepSpeed's collectives on a CPU, once all ranks have mapped it.

    DeepSpeed never does, which would leave 66 MiB per rank in /dev/shm after the job. Unlinked, the memory is freed when
    the processes end, however they end.
    """
    ranks.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{ranks.rank}").unlink(missing_ok=True)


@contextmanager
def _joining(timeout_seconds: float) -> Iterator[None]:
    """Turn the error of ranks that do not find each other into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_collective_failure(error):
            raise
        problem = (
            f"rank {os.environ['RANK']} has not found the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {timeout_seconds:.0f} s ({str(error).splitlines()[0]}): check that all are started and can reach that "
            "address; if they only take longer to start, raise deepspeed.timeout_seconds"
        )
        if os.environ["RANK"] == "0":
            raise TrainingError(problem) from error
        print(f"error: {problem}", file=sys.stderr, flush=True)  # the command line prints only rank 0's
        raise PeerError(problem) from error


def _describe(error: BaseException, ranks: Ranks, phases: PhaseStore) -> str:
    """Describe an error that occurred on this rank alone."""
    if isinstance(error, AlignProError):
        return f"rank {ranks.rank}: {error}"
    if is_collective_failure(error):
        reason = str(error).splitlines()[0]
        return (
            f"rank {ranks.rank} waited in vain for the others during {ranks.phase} ({reason}): {phases.describe_peers()}; "
            "--resume continues from the last checkpoint"
        )
    return f"rank {ranks.rank}, in {ranks.phase}:\n{''.join(traceback.format_exception(error))}"
