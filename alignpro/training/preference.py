"""The reward model: Bradley–Terry on pairs of a preferred and a rejected response.

P(chosen ≻ rejected) = σ(r(x, y_chosen) − r(x, y_rejected)); the loss is its negative log-likelihood (Bradley and Terry,
1952; Ouyang et al., 2022, eq. 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro.config import RewardModelConfig
from alignpro.data import Prompt, cluster_labels, load_prompts, split_for_training
from alignpro.prompting.length_filter import filter_refused_prompts
from alignpro.rewards.model import SequenceRewardModel, load_reward_model
from alignpro.theory.statistics import Clusters, Estimate, Interval, PairStatistics, pair_statistics
from alignpro.training.backend import TorchBackend
from alignpro.training.held_out_pairs import HeldOutPairs
from alignpro.training.metrics import Evaluation, Metrics, PhaseTimer
from alignpro.training.resume import check_data
from alignpro.training.stream import PromptStream


class RewardTrainer:
    """Trains a sequence classifier with one output on preference pairs.

    Args:
        config: Model, data and optimizer.

    Raises:
        DataError: The data has no preference pair.
        ModelError: The model cannot be loaded as a sequence classifier.
    """

    progress_metrics = ("loss", "accuracy")

    def __init__(self, config: RewardModelConfig) -> None:
        self.config = config
        data = load_prompts(config.data, require=("chosen", "rejected"))
        self.model: SequenceRewardModel = load_reward_model(config.model, config.max_length, seed=config.run.seed)
        prompts = filter_refused_prompts(
            data.prompts, lambda pair: self.model.encode(pair, pair.chosen or ""), input_name="the reward model's input"
        )
        training, self.heldout = split_for_training(prompts, config.data, config.run.eval_prompts)
        self.stream = PromptStream(training, config.batch_size, config.run.seed)
        self.model.requires_grad_(True)
        if config.model.gradient_checkpointing:
            self.model.classifier.gradient_checkpointing_enable({"use_reentrant": False})
        self.backend = TorchBackend(dict(self.model.named_parameters()), config.optimizer, config.run.steps)
        self._evaluated: tuple[int, HeldOutPairs | None] = -1, None  # after how many updates, and the result

    @property
    def updates(self) -> int:
        """Optimizer steps made so far."""
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        """Update the model on one batch of pairs."""
        timer = PhaseTimer()
        with timer("update"):
            self.model.train()
            prompts = self.stream.batch(step)
            size = self.config.optimizer.rows_per_pass
            margins = []
            for start in range(0, len(prompts), size):
                margin = self.margins(prompts[start : start + size])
                self.backend.backward(-torch.nn.functional.logsigmoid(margin).sum() / len(prompts))
                margins.append(margin.detach())
            rate = self.backend.learning_rate
            norm = self.backend.step()
        return {
            **_describe(torch.cat(margins)),
            "gradient_norm": norm,
            "learning_rate": rate,
            **timer.seconds,
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Compute loss, accuracy with its interval, calibration and the part of length on held-out pairs."""
        self.model.eval()
        pairs = self.heldout
        if not pairs:
            return Evaluation()
        size = self.config.batch_size
        margins = torch.cat([self.margins(pairs[start : start + size]) for start in range(0, len(pairs), size)])
        statistics = pair_statistics(
            margins,
            [(len(pair.chosen or ""), len(pair.rejected or "")) for pair in pairs],
            Clusters(cluster_labels(pairs, self.config.data.cluster)),
        )
        self._evaluated = self.updates, _kept(statistics, len(pairs))
        metrics = _describe(margins)
        for name, value in vars(statistics).items():
            metrics |= _with_bounds(name, value) if isinstance(value, Estimate) else {name: value}
        return Evaluation({f"eval/{name}": value for name, value in metrics.items()})

    def margins(self, pairs: Sequence[Prompt]) -> Tensor:
        """Compute r(x, y_chosen) − r(x, y_rejected), (B,)."""
        rewards = self.model([*pairs, *pairs], [p.chosen or "" for p in pairs] + [p.rejected or "" for p in pairs])
        chosen, rejected = rewards.chunk(2)
        return chosen - rejected

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizer; returns the rest of the state."""
        self.backend.save(directory, "model")
        return {"data": self.stream.fingerprint}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote."""
        check_data(state["data"], self.stream.fingerprint)
        self.backend.load(directory, "model")

    def export(self, directory: Path) -> None:
        """Write the classifier, its tokenizer, and how it ranks the held-out pairs."""
        if self.heldout and self._evaluated[0] != self.updates:
            self.evaluate(self.updates)
        if self._evaluated[1] is not None:
            self._evaluated[1].write(directory)
        self.model.classifier.save_pretrained(directory)
        self.model.tokenizer.save_pretrained(directory)


def _kept(statistics: PairStatistics, pairs: int) -> HeldOutPairs:
    """What is written beside the weights."""
    accuracy, above = statistics.accuracy.as_dict(), statistics.above_length.as_dict()
    return HeldOutPairs(
        pairs, accuracy["value"], accuracy["low"], accuracy["high"], above["value"], above["low"], above["high"]
    )


def _with_bounds(name: str, estimate: Estimate) -> Metrics:
    """The value, and the ends of its interval if it has one."""
    if not isinstance(estimate.interval, Interval):
        return {name: estimate.value}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _describe(margins: Tensor) -> Metrics:
    return {
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "accuracy": (0.5 + 0.5 * margins.sign()).mean().item(),  # a tie counts half
        "margin": margins.mean().item(),
    }
