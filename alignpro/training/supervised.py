"""Supervised fine-tuning: the prompter on (x, x') pairs, which yields ρ_sft, or a language model on (x, y) pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro.config import SamplingConfig, SFTConfig
from alignpro.data import Prompt, load_prompts, split_for_training
from alignpro.errors import DataError
from alignpro.models.adapters import add_adapter, describe_training
from alignpro.models.invocation import with_invocation
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_trainable
from alignpro.models.saving import save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.objectives import cross_entropy
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.model_card import write_card
from alignpro.prompting.moves import load_moves
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.rewrite_form import written_part
from alignpro.training.backend import TorchBackend
from alignpro.training.metrics import Evaluation, Metrics, PhaseTimer
from alignpro.training.resume import check_data
from alignpro.training.stream import PromptStream
from alignpro_kernels import policy_loss

logger = logging.getLogger(__name__)


def sft_pairs(config: SFTConfig) -> list[Prompt]:
    """The pairs to train on: those of the data, or its prompts rewritten by the moves that the configuration names.

    With ``prompting.form=addition``, moves and pairs that are no additions to the prompt are left out, and counted in the log.

    Raises:
        ConfigError: The moves cannot be read, or none of them is an addition.
        DataError: The data cannot be read, or has no pairs for the task.
    """
    form = config.prompting.form
    moves = None if config.data.moves is None else load_moves(config.data.moves).of_form(form)
    prompts = load_prompts(config.data, require=config.required_fields, distinct_by=(config.task,)).prompts
    if config.task == "rewrite" and form == "addition":
        prompts = _without_other_rewrites(prompts, keep_prompts=moves is not None)
    if moves is None:
        return prompts
    pairs = moves.pairs(prompts, config.data.moves_per_prompt, config.data.copies, config.run.seed, config.data.joined)
    if form == "addition":  # a template may be an addition to some prompts alone
        pairs = _without_other_rewrites(pairs, keep_prompts=False)
    logger.info(
        "%d pairs from %d prompts by %d moves (%s)", len(pairs), len(prompts), len(moves.moves), config.data.moves
    )
    return pairs


def _without_other_rewrites(prompts: Sequence[Prompt], *, keep_prompts: bool) -> list[Prompt]:
    """Leave out the rewrites that do not begin with their prompt, and the prompts too unless they are to be kept."""
    fits = [x.rewrite is None or written_part("addition", x.text, x.rewrite) is not None for x in prompts]
    if all(fits):
        return list(prompts)
    pairs, first = sum(x.rewrite is not None for x in prompts), prompts[fits.index(False)]
    told = (
        f"{fits.count(False)} of {pairs} pairs are no additions to their prompt (the first: {first.source or first.id})"
    )
    if not any(fits) and not keep_prompts:
        raise DataError(f"{told}: set prompting.form=whole")
    logger.warning("%s; they are left out, as prompting.form=addition wants it", told)
    left = [x if fit else replace(x, rewrite=None) for x, fit in zip(prompts, fits, strict=True)]
    return left if keep_prompts else [x for x, fit in zip(left, fits, strict=True) if fit]


class SFTTrainer:
    """Minimizes the cross-entropy of completions: −log p of each token of x' (or y), averaged over the batch's tokens.

    Args:
        config: Model, data and optimizer.

    Raises:
        DataError: The data has no pairs for the task, or no prompt leaves room for a completion.
        ModelError: The model cannot be loaded.
    """

    progress_metrics = ("loss",)

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        prompts = sft_pairs(config)
        start = load_trainable(config.policy, config.run.seed)
        self.model: LanguageModel = add_adapter(start, config.policy.adapter)
        logger.info("%s", describe_training(start, self.model))
        if config.policy.gradient_checkpointing:
            self.model.causal.gradient_checkpointing_enable(self.model.checkpoint_options)
        tokenizer = self.model.tokenizer
        self.prompter = PrompterTemplate(tokenizer, config.prompting, stop_token_ids=self.model.end_token_ids)
        self.chat = ChatTemplate(tokenizer, config.policy.chat_template)
        prompts = filter_overlong_prompts(
            prompts,
            with_invocation(self._encode_prompt, self.model.invocation),
            self._max_prompt_tokens,
            input_name="the model's input, beside a completion",
        )
        training, self.heldout = split_for_training(prompts, config.data, config.run.eval_prompts)
        self.stream = PromptStream(training, config.batch_size, config.run.seed)
        trainable = {n: w for n, w in self.model.named_parameters() if w.requires_grad}
        self.backend = TorchBackend(trainable, config.optimizer, config.run.steps)
        self._truncated = 0  # pairs in the current batch

    @property
    def updates(self) -> int:
        """Optimizer steps made so far."""
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        """Update the model on one batch."""
        timer = PhaseTimer()
        with timer("update"):
            self.model.train()
            self._truncated = 0
            pairs = [self._encode(prompt) for prompt in self.stream.batch(step)]
            tokens = sum(len(completion) for _, completion in pairs)
            loss = 0.0
            size = self.config.optimizer.rows_per_pass
            for start in range(0, len(pairs), size):
                partial = self._loss(pairs[start : start + size], tokens)
                self.backend.backward(partial)
                loss += partial.item()
            rate = self.backend.learning_rate
            norm = self.backend.step()
        return {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": float(tokens),
            "truncated": float(self._truncated),
            **timer.seconds,
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Compute cross-entropy per token and perplexity on held-out pairs."""
        self.model.eval()
        pairs = [self._encode(prompt) for prompt in self.heldout]
        tokens = sum(len(completion) for _, completion in pairs)
        if tokens == 0:
            return Evaluation()
        size = self.config.optimizer.rows_per_pass
        batches = (pairs[start : start + size] for start in range(0, len(pairs), size))
        loss = sum(self._loss(batch, tokens).item() for batch in batches)
        return Evaluation({"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))})

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizer; returns the rest of the state."""
        self.backend.save(directory, "model")
        return {"data": self.stream.fingerprint}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote."""
        check_data(state["data"], self.stream.fingerprint)
        self.backend.load(directory, "model")

    def export(self, directory: Path) -> None:
        """Write the model and its tokenizer."""
        save_pretrained(self.model, directory)
        if self.config.task == "rewrite":
            write_card(directory, self.prompter, SamplingConfig().max_tokens)

    @property
    def _max_prompt_tokens(self) -> int:
        """A completion of at least one token follows; the prompter's input has a limit of its own."""
        own = self.config.prompting.max_prompt_tokens if self.config.task == "rewrite" else self._limit
        return min(self._limit - 1, own)

    @property
    def _limit(self) -> int:
        return min(self.config.max_tokens, self.model.context_length)

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        return self.prompter.encode(prompt) if self.config.task == "rewrite" else self.chat.encode(prompt.messages)

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Return prompt and completion ids; the completion is cut so that both have at most ``max_tokens``."""
        ids = self._encode_prompt(prompt)
        if self.config.task == "rewrite":
            assert prompt.rewrite is not None
            completion = self.prompter.completion(prompt, prompt.rewrite)
        else:
            assert prompt.response is not None
            completion = self.chat.completion(prompt.response)
        if len(ids) + len(completion) > self._limit:
            self._truncated += 1
        return ids, completion[: self._limit - len(ids)]

    def _loss(self, pairs: Sequence[tuple[list[int], list[int]]], tokens: int) -> Tensor:
        prompts, completions = zip(*pairs, strict=True)
        batch = SequenceBatch.build(prompts, completions, self.model.device)
        states = self.model.action_states(batch)
        head = self.model.head
        return policy_loss(states, head.weight, batch.targets, cross_entropy(1.0 / tokens), **head.options).loss
