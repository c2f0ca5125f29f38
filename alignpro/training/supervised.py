"""Supervised fine-tuning: the prompter on (x, x') pairs, which yields ρ_sft, or a language model on (x, y) pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro.config import SFTConfig
from alignpro.data import Prompt, load_prompts, split
from alignpro.models.adapters import add_adapter, describe_training
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_trainable
from alignpro.models.saving import save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.training.backend import TorchBackend
from alignpro.training.metrics import Metrics, PhaseTimer
from alignpro.training.resume import check_data
from alignpro.training.stream import PromptStream
from alignpro_kernels import policy_loss

logger = logging.getLogger(__name__)


class SFTTrainer:
    """Minimizes the cross-entropy of completions: −log p of each token of x' (or y), averaged over the batch's tokens.

    Args:
        config: Model, data and optimizer.

    Raises:
        DataError: The data has no pairs for the task.
        ModelError: The model cannot be loaded.
    """

    progress_metrics = ("loss",)

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        field = config.task
        data = load_prompts(config.data, require=(field,))
        training, self.heldout = split(data.prompts, config.data.holdout)
        self.stream = PromptStream(training, config.batch_size, config.run.seed)
        start = load_trainable(config.policy, config.run.seed)
        self.model: LanguageModel = add_adapter(start, config.policy.adapter)
        logger.info("%s", describe_training(start, self.model))
        if config.policy.gradient_checkpointing:
            self.model.causal.gradient_checkpointing_enable(self.model.checkpoint_options)
        tokenizer = self.model.tokenizer
        self.prompter = PrompterTemplate(tokenizer, config.prompting)
        self.chat = ChatTemplate(tokenizer, config.policy.chat_template)
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
            for start in range(0, len(pairs), self.config.optimizer.micro_batch_size):
                partial = self._loss(pairs[start : start + self.config.optimizer.micro_batch_size], tokens)
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
    def evaluate(self, step: int) -> Metrics:
        """Compute cross-entropy per token and perplexity on held-out pairs."""
        self.model.eval()
        pairs = [self._encode(prompt) for prompt in self.heldout[: self.config.run.eval_prompts]]
        tokens = sum(len(completion) for _, completion in pairs)
        if tokens == 0:
            return {}
        size = self.config.optimizer.micro_batch_size
        batches = (pairs[start : start + size] for start in range(0, len(pairs), size))
        loss = sum(self._loss(batch, tokens).item() for batch in batches)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

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

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Return prompt and completion ids, cut on the right to ``max_tokens``, with at least one completion token."""
        if self.config.task == "rewrite":
            assert prompt.rewrite is not None
            ids, completion = self.prompter.encode(prompt), self.prompter.completion(prompt.rewrite)
        else:
            assert prompt.response is not None
            ids, completion = self.chat.encode(prompt.messages), self.chat.completion(prompt.response)
        limit = min(self.config.max_tokens, self.model.context_length)
        if len(ids) + len(completion) > limit:
            self._truncated += 1
            # The end of the prompt activates an activated LoRA, so the beginning is cut.
            ids = ids[-(limit - 1) :] if self.model.invocation else ids[: limit - 1]
            completion = completion[: limit - len(ids)]
        return ids, completion

    def _loss(self, pairs: Sequence[tuple[list[int], list[int]]], tokens: int) -> Tensor:
        prompts, completions = zip(*pairs, strict=True)
        batch = SequenceBatch.build(prompts, completions, self.model.device)
        states = self.model.action_states(batch)
        head = self.model.head

        def cross_entropy(
            logprob: Tensor, entropy: Tensor | None, kl: Tensor | None, rows: Tensor
        ) -> tuple[Tensor, Tensor, None, None]:
            return -logprob / tokens, torch.full_like(logprob, -1.0 / tokens), None, None

        return policy_loss(states, head.weight, batch.targets, cross_entropy, **head.options).loss
