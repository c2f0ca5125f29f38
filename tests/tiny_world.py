"""A world small enough to enumerate: all sequences of a tiny GPT-2, each with a made-up reward.

GPT-2 casts nothing to float32, so that gradients in float64 are exact up to rounding. The exact values here are computed
from the model's own logits, without padding, masks, caches or fused heads.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alignpro.config import AdapterConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.environments.base import Scores
from alignpro.models.adapters import add_adapter
from alignpro.models.language_model import LanguageModel
from alignpro.policy.policy import Policy
from alignpro.targets.base import BegunRollout
from alignpro.theory import SequenceSpace, enumerate_sequences, exact_objective
from alignpro.training.experience import Experience
from alignpro.training.reinforcement import RLTrainer

END = 0
VOCABULARY = {"<end>": END, "a": 1, "b": 2}
LENGTH = 3
"""Longest completion, including its end token; there are 15 sequences, and 7 of at most two tokens."""


class World:
    """A policy, a reference that differs from it, two prompts of different lengths, and the reward of every sequence.

    It is also the environment of `RLTrainer`, which scores samples.

    Args:
        dtype: Dtype of the models.
        drift: Distance of the policy's initial weights from the reference's; 0 starts at the reference.
        temperature: Sampling temperature.
        adapter: Which weights of the policy are trained.
        length: Longest completion, including its end token.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = 3,
        drift: float = 0.1,
        temperature: float = 0.8,
        adapter: AdapterConfig | None = None,
        length: int = LENGTH,
    ) -> None:
        torch.manual_seed(seed)
        self.length = length
        self.space: SequenceSpace = enumerate_sequences(len(VOCABULARY), END, length)
        self.prompts = [Prompt.from_text("a"), Prompt.from_text("b a a")]
        self.rewards = torch.rand(len(self.prompts), len(self.space.tokens), dtype=dtype)  # (P, S)
        start = _language_model(dtype)
        shake(start, 0.3)
        adapter = adapter or AdapterConfig(kind="full")
        reference = copy.deepcopy(start) if adapter.kind == "full" else None
        policy = add_adapter(start, adapter).to(dtype)  # peft makes a soft prompt in float32
        self.policy = Policy(policy, reference, temperature=temperature)
        shake(self.policy.model, drift)
        self.chains = [
            Chain(Completion(tokens, [0.0] * len(tokens), "stop" if tokens[-1] == END else "length"))
            for tokens in self.space.sequences
        ]
        """Return one chain per sequence, as the engine would."""
        self._number = {tuple(chain.sample.tokens): s for s, chain in enumerate(self.chains)}

    def training(self, objective: dict[str, Any], group: int, out: Path = Path(), **settings: Any) -> RLTrainer:
        """Return a trainer of this world's policy, with both prompts in each step.

        Args:
            objective: Settings of `ObjectiveConfig`.
            group: The number of samples per prompt, K.
            out: The run's directory.
            settings: Settings of `OptimizerConfig`, ``steps`` of `RunConfig`, and ``ahead`` of `RLTrainer`.
        """
        ahead = settings.pop("ahead", None)
        return RLTrainer(
            self.policy,
            self,
            Engine({"policy": self.policy.model}, max_batch=1024),
            self.prompts,
            self.prompts,
            sampling=SamplingParams(
                n=group, max_tokens=self.length, temperature=self.policy.temperature, stop_token_ids=(END,)
            ),
            prompts_per_step=len(self.prompts),
            objective=ObjectiveConfig.model_validate(objective),
            run=RunConfig(out=out, steps=settings.pop("steps", 1), sample_every=1000, tensorboard=False),
            optimizer=OptimizerConfig(**{"micro_batch_size": 64, **settings}),
            ahead=ahead,
        )

    # The environment.

    def encode(self, prompt: Prompt) -> list[int]:
        return [VOCABULARY[word] for word in prompt.text.split()]

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        groups = engine.generate("policy", [self.encode(prompt) for prompt in prompts], params, seeds)
        return [[Chain(sample) for sample in group] for group in groups]

    def begin_rollout(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int],
        drawn: Sequence[Sequence[Completion]] | None = None,
    ) -> BegunRollout:
        if drawn is not None:
            return BegunRollout(drawn, lambda: [[Chain(sample) for sample in group] for group in drawn])
        chains = self.rollout(engine, prompts, params, seeds)
        return BegunRollout([[chain.sample for chain in group] for group in chains], lambda: chains)

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        row = {prompt.id: p for p, prompt in enumerate(self.prompts)}
        drawn = [[self._number[tuple(chain.sample.tokens)] for chain in group] for group in chains]
        values = torch.stack([self.rewards[row[x.id], group] for x, group in zip(prompts, drawn, strict=True)])
        texts = [[" ".join(map(str, chain.sample.tokens)) for chain in group] for group in chains]
        return Scores(values, texts)

    # Exact values.

    def action_logprobs(self) -> Tensor:
        """Return log ρ(a_t|s_t) of every action of every sequence for each prompt, (P, S, T), differentiable."""
        tokens = self.space.tokens.expand(len(self.prompts), -1, -1).unsqueeze(-1)  # (P, S, T, 1)
        return self.next_logprobs().gather(-1, tokens).squeeze(-1)

    def sequence_logprobs(self) -> Tensor:
        """Return log ρ(x'|x) of every sequence for each prompt, (P, S), differentiable."""
        return self._along(self.next_logprobs())

    def reference_logprobs(self) -> Tensor:
        """Return log ρ_sft(x'|x), (P, S)."""
        return self._along(self.reference_next_logprobs())

    def next_logprobs(self) -> Tensor:
        """Return log ρ(.|s_t) along every sequence for each prompt, (P, S, T, V), differentiable."""
        return self._enumerate(self.policy.model.model)

    @torch.no_grad()
    def reference_next_logprobs(self) -> Tensor:
        """Return log ρ_sft(.|s_t), (P, S, T, V)."""
        if self.policy.reference is not None:
            return self._enumerate(self.policy.reference.model)
        with self.policy.model.model.disable_adapter():
            return self._enumerate(self.policy.model.model)

    def objective(self, kl_coef: float) -> Tensor:
        """Return J_λ, (), differentiable."""
        rows = zip(self.sequence_logprobs(), self.reference_logprobs(), self.rewards, strict=True)
        return torch.stack([exact_objective(*row, kl_coef) for row in rows]).mean()

    def _enumerate(self, model: Callable[..., Any]) -> Tensor:
        given = [torch.tensor([self.encode(prompt)] * len(self.chains)) for prompt in self.prompts]  # (S, L) each
        inputs = [torch.cat([prompt, self.space.tokens], dim=1) for prompt in given]
        logits = torch.stack([model(input_ids=ids).logits[:, -self.length - 1 : -1] for ids in inputs])
        return (logits / self.policy.temperature).log_softmax(-1)

    def _along(self, next_logprobs: Tensor) -> Tensor:
        tokens = self.space.tokens.expand(len(self.prompts), -1, -1).unsqueeze(-1)  # (P, S, T, 1)
        return torch.where(self.space.mask, next_logprobs.gather(-1, tokens).squeeze(-1), 0.0).sum(-1)


def shake(model: torch.nn.Module, size: float) -> None:
    """Add noise to the trained weights: a new GPT-2 is almost uniform, and a new adapter has no effect."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn_like(weight)


def credit(world: World, training: RLTrainer, groups: Sequence[Sequence[int]]) -> Experience:
    """Compute the experience of all groups of K sequences for both prompts: first all groups of one, then of the other."""
    prompts = [prompt for prompt in world.prompts for _ in groups]
    chains = [[world.chains[s] for s in group] for _ in world.prompts for group in groups]
    return training.compute_advantages(prompts, chains, world.score(prompts, chains))


def credit_ahead(
    world: World, training: RLTrainer, groups: Sequence[Sequence[int]], sampled: Tensor
) -> tuple[Experience, list[list[Chain]]]:
    """Compute the same of samples of another policy, before any correction, with the samples themselves.

    Args:
        world: Has the current policy.
        training: Its trainer.
        groups: Indices of sequences.
        sampled: (P, S, T) log-probability of every action of every sequence under the policy that drew them.
    """
    prompts = [prompt for prompt in world.prompts for _ in groups]
    chains = [
        [Chain(replace(world.chains[s].sample, logprobs=each[s][world.space.mask[s]].tolist())) for s in group]
        for each in sampled
        for group in groups
    ]
    return training.compute_advantages(prompts, chains, world.score(prompts, chains)), chains


def take_gradient(weights: Iterable[Tensor]) -> list[Tensor]:
    """Return the accumulated gradients of the weights, and clear them."""
    gradient = []
    for weight in weights:
        gradient.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        weight.grad = None
    return gradient


def distance(left: Sequence[Tensor], right: Sequence[Tensor], factor: float = 1.0) -> float:
    """Return max |left − factor · right|."""
    return max((a - factor * b).abs().max().item() for a, b in zip(left, right, strict=True))


def couple(p: Tensor, q: Tensor) -> list[tuple[int, int, float]]:
    """Return a joint distribution with the given marginals, (N,) each, as at most 2N − 1 triples (i, j, probability).

    A sum of a function of i and a function of j has the same expectation under it as under independence, which would take
    N² pairs.
    """
    cuts = sorted({0.0, *p.cumsum(0).tolist()[:-1], *q.cumsum(0).tolist()[:-1], 1.0})
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(cuts)], dtype=p.dtype)
    left, right = (torch.searchsorted(x.cumsum(0), middles).clamp_max(len(x) - 1).tolist() for x in (p, q))
    return [(i, j, b - a) for i, j, (a, b) in zip(left, right, itertools.pairwise(cuts), strict=True)]


def _language_model(dtype: torch.dtype) -> LanguageModel:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(VOCABULARY, unk_token="<end>")),
        unk_token="<end>",
        eos_token="<end>",
        pad_token="<end>",
    )
    config = GPT2Config(
        vocab_size=len(VOCABULARY), n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END
    )
    return LanguageModel(GPT2LMHeadModel(config).to(dtype), tokenizer, "tiny")
