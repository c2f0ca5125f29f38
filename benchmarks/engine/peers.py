"""The generation methods of transformers, each with its defaults, sampling from the full distribution.

Written against transformers 5.23.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.engine.cases import Case, Inputs
from benchmarks.engine.entrant import Entrant, Generated, Run, Setting, make_models

PAGE = 32
CPU_TICK = 4096
"""Maximum tokens per forward pass on a CPU, as in this project's engine."""

Sample = Callable[[PreTrainedModel, Sequence[Sequence[int]], int, int], list[list[int]]]
"""Model, prompts, sequences per prompt, their length → the generated sequences, grouped by prompt."""


def entrants() -> list[Entrant]:
    """Return `generate` and continuous batching."""
    return [
        Entrant("hf-generate", lambda case, inputs, setting: _two_stages(case, inputs, setting, _Generate(setting))),
        Entrant(
            "hf-continuous",
            lambda case, inputs, setting: _two_stages(case, inputs, setting, _Continuous(case, setting)),
        ),
    ]


def _two_stages(case: Case, inputs: Inputs, setting: Setting, sample: Sample) -> Run:
    """Make one call per model: the second stage starts when the first has finished."""
    models, w = make_models(case, setting), case.workload

    def run(turn: int) -> Generated:
        torch.manual_seed(turn)
        prompts = inputs.prompts(turn)
        if not case.chain:
            return Generated({"target": _count(sample(models["target"], prompts, w.M, w.response))})
        rewrites = sample(models["policy"], prompts, w.K, w.rewrite)
        responses = sample(models["target"], [inputs.to_target(rewrite) for rewrite in rewrites], w.M, w.response)
        return Generated({"policy": _count(rewrites), "target": _count(responses)})

    return run


def _count(sequences: Sequence[Sequence[int]]) -> int:
    return sum(map(len, sequences))


class _Generate:
    """`generate` on batches; prompts of unequal lengths are padded on the left."""

    def __init__(self, setting: Setting) -> None:
        self._max_batch = setting.max_batch

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, length: int
    ) -> list[list[int]]:
        generated: list[list[int]] = []
        size = max(1, self._max_batch // n)
        generate: Any = model.generate  # mypy infers a Tensor
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            longest = max(map(len, batch))
            rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in batch]
            mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
            ids = torch.tensor(rows, device=model.device)  # (B, L)
            sequences = generate(
                input_ids=ids,
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=_config(n, length),
            )
            generated += sequences[:, ids.shape[1] :].tolist()
        return generated


class _Continuous:
    """`generate_batch`, continuous batching; its manager, with its memory and graphs, persists between rounds."""

    def __init__(self, case: Case, setting: Setting) -> None:
        if setting.device.type == "cpu":
            # By default it takes nearly all free memory; here only what the running sequences need.
            pages = 1 + -(-case.context // PAGE)
            self._options = ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=setting.max_batch * pages,
                max_batch_tokens=CPU_TICK,
                max_requests_per_batch=setting.max_batch,
            )
        else:
            self._options = ContinuousBatchingConfig(max_memory_percent=0.8 / len(case.shapes))

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n: int, length: int
    ) -> list[list[int]]:
        generate_batch: Any = model.generate_batch  # mypy infers a Tensor
        outputs = generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=_config(n, length),
            continuous_batching_config=copy.copy(self._options),  # it is modified: missing values are filled in
            persistent_manager=True,
        )
        failed = [output.error for output in outputs.values() if output.error]
        if failed:
            raise RuntimeError(failed[0])
        if len(outputs) != n * len(prompts):
            raise RuntimeError(f"generate_batch returned {len(outputs)} of {n * len(prompts)} sequences")
        return [output.generated_tokens for output in outputs.values()]


def _config(n: int, length: int) -> GenerationConfig:
    """Return a configuration in which sequences end only at their maximum length."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=n,
        max_new_tokens=length,
        use_cache=True,
    )
