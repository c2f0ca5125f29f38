"""The program of a rank: deepspeed benchmarks/distributed/rank.py JOB.pickle"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from alignpro.distributed.ranks import Ranks
from alignpro.distributed.session import distributed_session
from alignpro.training.deepspeed_backend import DeepSpeedDistribution
from alignpro.training.multi_process import resolve_zero_config
from benchmarks.distributed.job import ALONE, Job
from benchmarks.distributed.memory import DeviceGauge, PhasePeaks, StorageGauge
from benchmarks.training.ours import OurTraining, configure

TIMEOUT = 600.0


def main(path: Path) -> None:
    """Run the job; each rank writes its results."""
    job = Job.load(path)
    torch.set_num_threads(job.threads)
    with distributed_session(TIMEOUT) as ranks:
        counting = StorageGauge() if job.memory and job.device == "cpu" else nullcontext()
        with counting as storages:
            result = run(job, ranks, storages)
        (job.out / f"{ranks.rank}.json").write_text(json.dumps(result))


def run(job: Job, ranks: Ranks, storages: StorageGauge | None) -> dict[str, Any]:
    """Return, for each set-up, its steps and the peak bytes per phase over all steps but the first."""
    device = torch.device(job.device if job.device == "cpu" else get_accelerator().current_device_name())
    trainings = {name: made for name in job.setups if (made := _make(job, name, device, ranks)) is not None}
    gauge = storages or (None if device.type == "cpu" else DeviceGauge(device))
    if storages is not None:
        storages.count_existing()
    peaks = {name: PhasePeaks(gauge, ranks) for name in trainings} if gauge else {}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in trainings}
    for index in range(job.task.steps):
        for name in job.setups:
            ranks.all_gather_object(
                None
            )  # a barrier, so that set-ups do not overlap and all ranks of one start together
            if name in trainings:
                with peaks[name].step() if name in peaks else nullcontext():
                    steps[name].append(asdict(trainings[name].step(index)))
        if index == 0:  # it also allocates the optimizer state and the KV arena, which later steps reuse
            for each in peaks.values():
                each.bytes.clear()
    return {name: {"steps": steps[name], "peaks": peaks[name].bytes if peaks else {}} for name in trainings}


def _make(job: Job, name: str, device: torch.device, ranks: Ranks) -> OurTraining | None:
    """Return the training of a set-up, or None if this rank does not take part in it."""
    overrides = [*job.overrides, f"run.out={job.task.directory}/run_{Path(name).stem}"]
    if name == ALONE:
        return OurTraining(job.task, device, overrides) if ranks.is_rank_zero else None
    overrides.append(f"deepspeed.config={name}")
    config = configure(job.task, device, overrides)
    return OurTraining(
        job.task,
        device,
        overrides,
        DeepSpeedDistribution(ranks, resolve_zero_config(config, ranks.size), config.deepspeed),
    )


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
