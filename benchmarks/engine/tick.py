"""python -m benchmarks.engine.tick: a decode tick of a target model, taken apart.

All sequences have been prefilled and draw a token each per tick. The tick's time is that of ticks that follow each
other, each launched before the tokens of the one before it are known, and is compared with that of ticks that wait for them;
what it consists of comes from a profile of ten others: products, attention, the head with the sampler, all other
kernels, and the host's part, in which the device is idle. The trace of the profile is kept beside the results.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

from torch.profiler import ProfilerActivity, profile

from alignpro.engine import Engine, SamplingParams
from alignpro.models.language_model import LanguageModel
from benchmarks import command
from benchmarks.device import empty_cache, synchronize
from benchmarks.engine.cases import Case, make_inputs
from benchmarks.engine.entrant import Setting, make_models
from benchmarks.engine.floor import floor_seconds, measure_rates
from benchmarks.models import make_chat_template, make_tokenizer
from benchmarks.session import Session
from benchmarks.workload import GPU, QUICK, Workload

PROFILED = 10
TIMED = 30
WARM = 12
"""Ticks before the timed ones: graphs are captured and tiles are tuned."""
KINDS = {
    "attention": r"attention|combine_kernel|merge_kernel|flash|fmha",
    "head": r"sample_kernel|choice_kernel|logits_kernel|statistics_kernel|linear_sample",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|aten::(mm|addmm|bmm)\b|packed_linear|decoder",
}
"""Kind → the names of its kernels, on a CPU of its operators; the first that matches. All others are ``small``."""

app = command.new_app()


@app.command(help=__doc__)
def run(
    device: command.Device = "auto",
    dtype: command.Dtype = "auto",
    sequences: int = 256,
    context: int = 256,
    threads: command.Threads = None,
    seed: command.Seed = 0,
    json_file: command.ResultsFile = None,
    quick: command.Quick = False,
) -> None:
    """See the module."""
    session = Session("engine.tick", device=device, dtype=dtype, threads=threads, quick=quick, file=json_file)
    sequences, context = (3, 8) if quick else (sequences, context)
    case = _case(QUICK if quick else GPU, sequences, context)
    rates = measure_rates(session.device, session.dtype)
    empty_cache(session.device)
    setting = Setting(session.device, session.dtype, sequences, seed)
    (causal,) = make_models(case, setting).values()
    model = LanguageModel(causal, make_tokenizer(make_chat_template("", "")), "target").requires_grad_(False)
    waiting_s = _Ticks(case, model, setting, async_scheduling=False).time()
    empty_cache(session.device)
    ticks = _Ticks(case, model, setting, async_scheduling=True)
    document: dict[str, Any] = {
        "run": session.describe(seed=seed, rates=asdict(rates)),
        "sequences": sequences,
        "context": context,
        "model": asdict(case.workload.target),
        "floor_s": floor_seconds(_one_tick(case), rates, session.dtype)["decode"],
        "tick_s": ticks.time(),
        "tick_waiting_s": waiting_s,
    }
    session.save(document)
    kernels, trace = ticks.profile()
    trace.export_chrome_trace(str(session.file.with_suffix(".trace.json.gz")))
    seconds = {kind: sum(s for name, (_, s) in kernels.items() if kind_of(name) == kind) for kind in (*KINDS, "small")}
    seconds["host"] = max(0.0, document["tick_s"] - sum(seconds.values()))
    document |= {
        "seconds": seconds,
        "launches": sum(count for count, _ in kernels.values()),
        "kernels": [
            {"name": name, "kind": kind_of(name), "calls": calls, "seconds": spent}
            for name, (calls, spent) in sorted(kernels.items(), key=lambda item: -item[1][1])
        ],
        "decode_ticks": dict(ticks.engine.stats.decode_ticks),
    }
    session.save(document)
    session.print(
        f"tick {document['tick_s'] * 1e3:.2f} ms, without async scheduling {waiting_s * 1e3:.2f} ms, "
        f"floor {document['floor_s'] * 1e3:.2f} ms"
    )
    for kind, spent in seconds.items():
        session.print(f"  {kind:10} {spent * 1e3:8.3f} ms")
    session.finish()


class _Ticks:
    """Sequences of a case that have been prefilled and go on for as many tokens as are asked for."""

    def __init__(self, case: Case, model: LanguageModel, setting: Setting, *, async_scheduling: bool) -> None:
        self._device = setting.device
        self.engine = Engine({"target": model}, max_batch=setting.max_batch, async_scheduling=async_scheduling)
        params = SamplingParams(max_tokens=case.workload.response)
        for prompt in make_inputs(case, setting.seed).prompts(0):
            self.engine.submit("target", prompt, params)
        computed = self.engine.stats.computed
        while computed["decode"] < WARM * case.workload.prompts:
            self.engine.step()

    def time(self) -> float:
        """Return the mean seconds of a tick."""
        synchronize(self._device)
        started = time.perf_counter()
        for _ in range(TIMED):
            self.engine.step()
        synchronize(self._device)
        return (time.perf_counter() - started) / TIMED

    def profile(self) -> tuple[dict[str, tuple[float, float]], profile]:
        """Return kernel → calls and seconds per tick, and the profile."""
        on_gpu = self._device.type != "cpu"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as made:
            for _ in range(PROFILED):
                self.engine.step()
            synchronize(self._device)
        calls: defaultdict[str, float] = defaultdict(float)
        spent: defaultdict[str, float] = defaultdict(float)
        for event in made.key_averages():
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            # On a GPU the operators that launched a kernel are listed too, with its time; only kernels count.
            if microseconds > 0 and on_gpu == (event.device_type.name == "CUDA"):
                calls[event.key] += event.count / PROFILED
                spent[event.key] += microseconds / 1e6 / PROFILED
        return {name: (calls[name], spent[name]) for name in calls}, made


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), "small")


def _case(workload: Workload, sequences: int, context: int) -> Case:
    """Return prompts to which the ticks that are timed add tokens up to ``context`` in the middle of them."""
    drawn = WARM + TIMED + PROFILED + 4  # and some, so that no sequence ends
    prompt = max(1, context - WARM - TIMED // 2)
    alone = replace(workload, name="tick", meta_prompt=0, template=0, prompts=sequences, K=1, M=1)
    return Case(replace(alone, prompt=prompt, response=drawn), "tick", chain=False)


def _one_tick(case: Case) -> Case:
    """Return the same sequences with all but one tick of the timed ones in their prompts, for the floor of that tick."""
    w = case.workload
    return replace(case, workload=replace(w, prompt=w.prompt + WARM + TIMED // 2, response=2))


if __name__ == "__main__":
    app()
