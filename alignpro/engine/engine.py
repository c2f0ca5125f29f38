"""The generation engine: batched sampling from one model, and chains of two (prompter → target).

A prompt is prefilled once for its n completions; the cache is then repeated. Sequences that have ended leave the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignpro.engine.cache import slab_cache
from alignpro.engine.sampler import derive_seed, position_seeds, sample
from alignpro.engine.types import Chain, Completion, SamplingParams
from alignpro.models import LanguageModel

ToTarget = Callable[[int, Completion], list[int]]
"""(index of the prompt, the policy's sample) → the target's prompt tokens."""


@dataclass
class EngineStats:
    """Counts since the engine was made."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    sequences: int = 0
    seconds: float = 0.0


class Engine:
    """Samples from a set of named models.

    Args:
        models: Name → model; the trainer's own modules, never copies.
        max_batch: Sequences decoded at once.
    """

    def __init__(self, models: Mapping[str, LanguageModel], *, max_batch: int = 256) -> None:
        self.models = dict(models)
        self.max_batch = max_batch
        self.stats = EngineStats()

    def generate(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Draw ``params.n`` completions of each prompt.

        Args:
            name: Which model.
            prompts: Token ids.
            params: How to draw.
            seeds: One a prompt; derived from ``params.seed`` and the prompt's index when absent. Completion k of a
                prompt draws from (its seed, k): the result does not depend on batching.

        Returns:
            One list of n completions a prompt. A prompt that cannot be run has completions whose ``finish_reason`` is
            ``error``; the others are not affected.
        """
        started = time.perf_counter()
        model = self.models[name]
        seeds = [derive_seed(params.seed, i) for i in range(len(prompts))] if seeds is None else seeds
        results: list[list[Completion]] = [[] for _ in prompts]
        runnable = []
        for i, prompt in enumerate(prompts):
            problem = _refusal(model, prompt, params)
            if problem:
                results[i] = [Completion([], [], "error", problem) for _ in range(params.n)]
            else:
                runnable.append(i)
        runnable.sort(key=lambda i: len(prompts[i]))  # neighbours of like length: little padding
        for batch in _batches(runnable, params.n, self.max_batch):
            batch_seeds = [[derive_seed(seeds[i], k) for k in ks] for i, ks in batch]
            decoded = self._decode(model, [prompts[i] for i, _ in batch], batch_seeds, params)
            for (i, _), completions in zip(batch, decoded, strict=True):
                results[i].extend(completions)
        self.stats.seconds += time.perf_counter() - started
        return results

    def run_chains(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        rewrite: SamplingParams,
        to_target: ToTarget,
        respond: SamplingParams,
        seeds: Sequence[int] | None = None,
        policy: str = "policy",
        target: str = "target",
    ) -> list[list[Chain]]:
        """x → ``rewrite.n`` rewrites by `policy` → ``respond.n`` responses of `target` to each.

        Response m to rewrite k of a prompt draws from (the prompt's seed, "respond", k, m).
        """
        seeds = [derive_seed(rewrite.seed, i) for i in range(len(prompts))] if seeds is None else seeds
        groups = self.generate(policy, prompts, rewrite, seeds)
        chains = [
            [Chain(s, [] if s.finish_reason == "error" else to_target(i, s)) for s in group]
            for i, group in enumerate(groups)
        ]
        pending = [(i, k) for i, group in enumerate(chains) for k, c in enumerate(group) if c.sample.error is None]
        responses = self.generate(
            target,
            [chains[i][k].target_tokens for i, k in pending],
            respond,
            [derive_seed(seeds[i], "respond", k) for i, k in pending],
        )
        for (i, k), group in zip(pending, responses, strict=True):
            chains[i][k].responses = group
        return chains

    @torch.no_grad()
    def _decode(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
    ) -> list[list[Completion]]:
        """Prefill each distinct prompt once, fork its cache for its completions, decode until all have ended."""
        device = model.device
        distinct: dict[tuple[int, ...], int] = {}
        source = [
            distinct.setdefault(tuple(p), len(distinct)) for p, group in zip(prompts, seeds, strict=True) for _ in group
        ]
        total, longest = len(source), params.max_tokens
        cache, head = slab_cache(model.causal.config), model.head
        ids, mask = _pad_left(list(distinct), device)
        prefilled = model.hidden(ids, mask, cache)[:, -1]  # (distinct prompts, D)
        fork = torch.tensor(source, device=device)
        cache.batch_select_indices(fork)
        last = prefilled[fork]  # (B, D)
        mask = torch.nn.functional.pad(mask[fork], (0, longest), value=1)  # (B, L + T)
        flat = torch.tensor([seed for group in seeds for seed in group], device=device)
        row_seeds = position_seeds(flat, torch.arange(longest, device=device))  # (B, T)
        stop = torch.tensor(params.stop_token_ids, device=device, dtype=torch.int64)
        drawn = _Drawn.empty(total, longest, device)
        active = torch.arange(total, device=device)  # row of the batch → completion
        for position in range(longest):
            token, logprob = sample(last, head, params, row_seeds[active, position])
            ended = torch.isin(token, stop)
            drawn.add(active, position, token, logprob, ended)
            if position + 1 == longest:
                break
            if ended.any():
                keep = _compacted(ended)
                if len(keep) == 0:
                    break
                active, mask, token = active[keep], mask[keep], token[keep]
                cache.batch_select_indices(keep)
            last = model.hidden(token[:, None], mask[:, : ids.shape[1] + position + 1], cache)[:, -1]
        completions = drawn.completions()
        self.stats.prefill_tokens += sum(map(len, distinct))
        self.stats.sequences += total
        self.stats.decode_tokens += sum(len(c.tokens) for c in completions)
        iterator = iter(completions)
        return [[next(iterator) for _ in group] for group in seeds]


@dataclass
class _Drawn:
    """What a batch of B completions of at most T tokens has drawn so far, on the device."""

    tokens: Tensor  # (B, T) int64
    logprobs: Tensor  # (B, T) float64: holds float32 as it is
    lengths: Tensor  # (B,) int64
    stopped: Tensor  # (B,) bool

    @classmethod
    def empty(cls, count: int, longest: int, device: torch.device) -> _Drawn:
        return cls(
            torch.zeros(count, longest, dtype=torch.int64, device=device),
            torch.zeros(count, longest, dtype=torch.float64, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
        )

    def add(self, rows: Tensor, position: int, token: Tensor, logprob: Tensor, ended: Tensor) -> None:
        self.tokens[rows, position] = token
        self.logprobs[rows, position] = logprob.double()
        self.lengths[rows] = position + 1
        self.stopped[rows] = ended

    def completions(self) -> list[Completion]:
        columns = (self.tokens, self.logprobs, self.lengths, self.stopped)
        return [
            Completion(tokens[:length], logprobs[:length], "stop" if stopped else "length")
            for tokens, logprobs, length, stopped in zip(*(c.tolist() for c in columns), strict=True)
        ]


def _compacted(ended: Tensor) -> Tensor:
    """Rows that go on, (B',): in place but for those at the end, which fill the gaps, so that few rows move."""
    count = int((~ended).sum())
    keep = torch.arange(count, device=ended.device)
    keep[ended[:count]] = count + (~ended[count:]).nonzero().squeeze(-1)
    return keep


def _refusal(model: LanguageModel, prompt: Sequence[int], params: SamplingParams) -> str | None:
    if not prompt:
        return "the prompt is empty"
    if unknown := [token for token in (min(prompt), max(prompt)) if not 0 <= token < model.vocabulary]:
        return f"token {unknown[0]} is not in the vocabulary of {model.vocabulary} of {model.name}"
    if len(prompt) + params.max_tokens > model.context_length:
        return (
            f"{len(prompt)} prompt tokens and {params.max_tokens} new ones do not fit in the context of "
            f"{model.context_length} tokens of {model.name}"
        )
    return None


def _batches(indices: Sequence[int], n: int, size: int) -> list[list[tuple[int, list[int]]]]:
    """Cut n completions of each prompt into batches of at most `size` sequences: (prompt, its completions' numbers)."""
    batches: list[list[tuple[int, list[int]]]] = []
    room = 0
    for i in indices:
        k = 0
        while k < n:
            if room == 0:
                batches.append([])
                room = size
            take = min(n - k, room)
            batches[-1].append((i, list(range(k, k + take))))
            k, room = k + take, room - take
    return batches


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, L) each; the padding id is masked, so any id will do."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
