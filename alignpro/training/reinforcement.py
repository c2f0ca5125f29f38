"""Reinforcement learning of a policy in an environment: the prompter against a frozen target, or RLHF of the target.

prompts x → K samples each (engine) → R of each (environment) → what each action is worth (objectives)
          → loss and gradient in one pass over the head (kernels) → optimizer step (backend)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro import objectives
from alignpro.config import ObjectiveConfig, OptimizerConfig, RunConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Engine, SamplingParams, derive_seed
from alignpro.environment import Environment, Scores
from alignpro.errors import CheckpointError
from alignpro.models import save_pretrained
from alignpro.policy import Policy, TokenValues
from alignpro.sequences import SequenceBatch
from alignpro.training.backend import TorchBackend
from alignpro.training.critic import Critic
from alignpro.training.metrics import Metrics, PhaseTimer, append_row
from alignpro.training.stream import PromptStream


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the update needs; B = P·K rows, prompt-major, of T actions at most."""

    batch: SequenceBatch
    scores: Tensor
    """(B,) R."""
    values: TokenValues
    """Of the policy that sampled."""
    state_index: Tensor
    """(B, T) int64: the row of ``values.reference_states`` that belongs to an action."""
    returns: Tensor
    """(B, T) G_t: the score less the KL still to come (or so far as the estimator puts it in the reward)."""
    advantages: Tensor
    """(B, T)."""
    value_targets: Tensor | None
    """(B, T), for the critic."""


class PolicyTraining:
    """One step: sample, score, credit, update. The same for every loss, policy and environment.

    Args:
        policy: What is trained.
        environment: What scores its samples.
        engine: Samples; its model ``policy`` is the policy's own.
        training: Prompts to learn from.
        heldout: Prompts to evaluate on.
        sampling: How the policy samples its K (``n``) samples a prompt.
        prompts_per_step: P.
        objective: Which loss, on which advantages.
        optimizer: Learning rate, schedule, micro-batches.
        run: Steps, seed, directory.
    """

    headline: tuple[str, ...] = ("reward/mean", "kl", "entropy")

    def __init__(
        self,
        policy: Policy,
        environment: Environment,
        engine: Engine,
        training: Sequence[Prompt],
        heldout: Sequence[Prompt],
        *,
        sampling: SamplingParams,
        prompts_per_step: int,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        run: RunConfig,
    ) -> None:
        self.policy, self.environment, self.engine = policy, environment, engine
        self.stream = PromptStream(training, prompts_per_step, run.seed)
        self.heldout = heldout
        self.sampling, self.objective, self.optimizer, self.run = sampling, objective, optimizer, run
        updates = run.steps * objective.epochs * objective.minibatches
        self.backend = TorchBackend(policy.trainable, optimizer, updates)
        self.kl = objectives.AdaptiveKL(objective.kl.coef, objective.kl.target, objective.kl.horizon)
        self.baseline = objectives.RunningBaseline(objective.baseline_decay)
        self.critic = Critic(policy.model, optimizer, updates) if objective.advantage == "gae" else None

    @property
    def updates(self) -> int:
        """Optimizer steps made so far."""
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        """Sample K chains of each prompt, score them, credit their actions, update the policy."""
        timer = PhaseTimer()
        prompts = self.stream.batch(step)
        seeds = [derive_seed(self.run.seed, step, i) for i in range(len(prompts))]
        with timer("rollout"):
            chains = self.environment.rollout(self.engine, prompts, self.sampling, seeds)
            if self.policy.model.device.type != "cpu":
                self.engine.release()  # the update needs the accelerator's memory
        with timer("reward"):
            scores = self.environment.score(prompts, chains)
        with timer("credit"):
            experience = self.credit(prompts, chains, scores)
        with timer("update"):
            metrics = {"learning_rate": self.backend.learning_rate, "kl_coef": self.kl.coef}
            metrics |= self.update(experience, step)
        metrics |= self._describe(experience, scores)
        self.kl.update(metrics["kl"], len(experience.scores))
        self.baseline.update(experience.returns[:, 0].mean().item())
        if step % self.run.sample_every == 0:
            self._write_sample(step, prompts[0], scores)
        return metrics | timer.seconds

    def credit(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]], scores: Scores) -> Experience:
        """What each action is worth: rewards after it, less a baseline that does not depend on it."""
        objective = self.objective
        batch = SequenceBatch.build(
            [ids for prompt in prompts for ids in [self.environment.encode(prompt)] * self.sampling.n],
            [chain.sample.tokens for group in chains for chain in group],
            self.policy.model.device,
        )
        micro_batches = list(self._micro_batches(len(batch)))
        # One micro-batch is all that the first update passes over, at the weights of now: its graph is kept for that.
        keep = len(micro_batches) == 1 and objective.loss != "gibbs" and objective.minibatches == 1
        parts = [self.policy.token_values(batch.rows(*rows), keep_states=keep) for rows in micro_batches]
        values = parts[0] if keep else _concatenate(parts, batch.mask.shape[1])
        R = scores.values.flatten().to(values.logprob)  # (B,)
        rewards = objectives.token_rewards(
            R,
            batch.mask,
            self.kl.coef,
            objective.kl.estimator,
            kl=values.kl,
            logratio=values.logprob - values.reference_logprob,
        )
        returns = objectives.returns_to_go(rewards, batch.mask)
        value_targets = None
        if objective.advantage == "gae":
            assert self.critic is not None
            estimates = self.critic.values(batch, self._micro_batches(len(batch)))
            advantages, value_targets = objectives.gae(rewards, estimates, batch.mask, objective.gae_lambda)
        elif objective.advantage == "running_baseline":
            advantages = self.baseline.advantages(returns, batch.mask)
        elif objective.advantage == "group_normalized":
            advantages = objectives.group_normalized(returns, batch.mask, R, self.sampling.n)
        else:
            advantages = objectives.leave_one_out(returns, batch.mask, R, self.sampling.n)
        return Experience(
            batch=batch,
            scores=R,
            values=values,
            state_index=batch.scatter(torch.arange(int(batch.mask.sum()), device=R.device)),
            returns=returns,
            advantages=advantages,
            value_targets=value_targets,
        )

    def update(self, experience: Experience, step: int) -> Metrics:
        """Epochs over the rollout in minibatches of whole groups, shuffled anew each epoch; one optimizer step each."""
        updates: list[Metrics] = []
        for epoch in range(self.objective.epochs):
            for groups in self._minibatches(len(experience.batch) // self.sampling.n, step, epoch):
                minibatch = _select(experience, groups, self.sampling.n)
                metrics = self._backward(minibatch, None if updates else experience.values.states)
                metrics["gradient_norm"] = self.backend.step()
                self.engine.weights_updated("policy")
                if self.critic is not None:
                    metrics |= self.critic.step()
                updates.append(metrics)
        return _mean(updates)

    def _backward(self, minibatch: Experience, states: Tensor | None = None) -> Metrics:
        """Gradients of a minibatch, micro-batch by micro-batch; ``states`` (N, D) of all its actions, if they are known."""
        objective, total = self.objective, 0.0
        details: list[Metrics] = []
        tokens: list[int] = []
        scale = objectives.loss_scale(minibatch.batch.mask, objective.normalize_by)
        for start, stop in self._micro_batches(len(minibatch.batch)):
            batch = minibatch.batch.rows(start, stop)
            width = batch.mask.shape[1]
            if objective.loss == "gibbs":
                loss = objectives.gibbs_loss(
                    self.policy.sequence_logprob(batch),
                    minibatch.values.reference_logprob[start:stop].sum(1),
                    minibatch.scores[start:stop],
                    self.sampling.n,
                    self.kl.coef,
                ) * ((stop - start) / len(minibatch.batch))
            else:
                rows = objectives.PolicyGradientBatch(
                    advantages=minibatch.advantages[start:stop, :width][batch.mask],
                    scale=scale,
                    kl_coef=self.kl.coef,
                    kl_estimator=objective.kl.estimator,
                    reference_logprob=minibatch.values.reference_logprob[start:stop, :width][batch.mask],
                    old_logprob=minibatch.values.logprob[start:stop, :width][batch.mask],
                    entropy_coef=objective.entropy_coef,
                )
                if objective.loss == "ppo_clip":
                    coefficients = objectives.ppo_clip_coefficients(rows, objective.clip_range)
                else:
                    coefficients = objectives.policy_gradient_coefficients(rows)
                reference = None
                if objective.kl.estimator == "exact" and self.kl.coef > 0:
                    reference = minibatch.values.reference_states[minibatch.state_index[start:stop, :width][batch.mask]]
                loss = self.policy.loss(
                    batch,
                    coefficients,
                    states=states,
                    reference_states=reference,
                    entropy=objective.entropy_coef > 0,
                ).loss
                details.append(coefficients.metrics())
                tokens.append(len(rows.advantages))
            self.backend.backward(loss)
            total += loss.item()
            if self.critic is not None and minibatch.value_targets is not None:
                targets = minibatch.value_targets[start:stop, :width]
                self.critic.backward(batch, targets, scale * objective.value_coef)
        return {"loss": total, **_mean(details, tokens)}

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Reward and KL of one sample for each of some held-out prompts."""
        prompts = self.heldout[: self.run.eval_prompts]
        if not prompts:
            return {}
        seeds = [derive_seed(self.run.seed, "evaluate", i) for i in range(len(prompts))]
        chains = self.environment.rollout(self.engine, prompts, replace(self.sampling, n=1), seeds)
        scores = self.environment.score(prompts, chains)
        batch = SequenceBatch.build(
            [self.environment.encode(prompt) for prompt in prompts],
            [group[0].sample.tokens for group in chains],
            self.policy.model.device,
        )
        kl = sum(self.policy.token_values(batch.rows(*r)).kl.sum().item() for r in self._micro_batches(len(batch)))
        return {"eval/reward": scores.values.mean().item(), "eval/kl": kl / len(prompts)}

    def save(self, directory: Path) -> dict[str, Any]:
        """Weights and optimizers; the rest of the state."""
        self.backend.save(directory, "policy")
        if self.critic is not None:
            self.critic.backend.save(directory, "critic")
        return {
            "reference": self.policy.reference_id(),
            "data": self.stream.fingerprint,
            "kl": self.kl.state_dict(),
            "baseline": self.baseline.state_dict(),
        }

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Take up what `save` left.

        Raises:
            CheckpointError: The reference or the data is not what the run started with.
        """
        self.stream.check(state["data"])
        if state["reference"] != self.policy.reference_id():
            raise CheckpointError(
                f"checkpoint {directory}: the reference model has changed since this run started; its KL would be to "
                "another model: restore it, or start a new run"
            )
        self.backend.load(directory, "policy")
        self.engine.weights_updated("policy")
        if self.critic is not None:
            self.critic.backend.load(directory, "critic")
        self.kl.load_state_dict(state["kl"])
        self.baseline.load_state_dict(state["baseline"])

    def export(self, directory: Path) -> None:
        """Write the model (or its adapter) and the tokenizer."""
        save_pretrained(self.policy.model, directory)

    def _micro_batches(self, rows: int) -> Iterator[tuple[int, int]]:
        """Row ranges (start, stop) of at most ``micro_batch_size`` rows; of whole groups where they fit."""
        size = self.optimizer.micro_batch_size
        # A group's prompt is computed once in a micro-batch; and Gibbs compares within a group, however large it is.
        if size >= self.sampling.n or self.objective.loss == "gibbs":
            size = max(1, size // self.sampling.n) * self.sampling.n
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

    def _minibatches(self, groups: int, step: int, epoch: int) -> list[Tensor]:
        """Indices of groups, split evenly; in order when there is one minibatch, so that nothing is shuffled in vain."""
        order = torch.arange(groups)
        if self.objective.minibatches > 1:
            generator = torch.Generator().manual_seed(derive_seed(self.run.seed, "minibatch", step, epoch))
            order = torch.randperm(groups, generator=generator)
        return list(order.tensor_split(self.objective.minibatches))

    def _describe(self, experience: Experience, scores: Scores) -> Metrics:
        mask, values = experience.batch.mask, experience.values
        tokens = mask.sum()
        return {
            "reward/mean": scores.values.mean().item(),
            "reward/std": scores.values.std().item() if scores.values.numel() > 1 else 0.0,
            "kl": (values.kl.sum() / len(mask)).item(),
            "kl_sampled": ((values.logprob - values.reference_logprob).sum() / len(mask)).item(),
            "entropy": (values.entropy.sum() / tokens).item(),
            "sample/length": (tokens / len(mask)).item(),
            **scores.metrics,
        }

    def _write_sample(self, step: int, prompt: Prompt, scores: Scores) -> None:
        row = {
            "step": step + 1,
            "prompt": prompt.text,
            "sample": scores.samples[0][0],
            "responses": scores.responses[0][0],
            "value": scores.values[0][0].item(),
        }
        append_row(self.run.out / "samples.jsonl", row)


def _mean(rows: Sequence[Metrics], weights: Sequence[int] | None = None) -> Metrics:
    """Weighted mean of each metric; the rows have the same ones."""
    weights = [1] * len(rows) if weights is None else weights
    names = rows[0] if rows else ()
    return {name: sum(row[name] * w for row, w in zip(rows, weights, strict=True)) / sum(weights) for name in names}


def _concatenate(parts: Sequence[TokenValues], width: int) -> TokenValues:
    """Row blocks of different widths → one, (B, T)."""

    def join(blocks: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1])) for block in blocks])

    return TokenValues(
        logprob=join([part.logprob for part in parts]),
        reference_logprob=join([part.reference_logprob for part in parts]),
        kl=join([part.kl for part in parts]),
        entropy=join([part.entropy for part in parts]),
        reference_states=torch.cat([part.reference_states for part in parts]),
    )


def _select(experience: Experience, groups: Tensor, size: int) -> Experience:
    """The rows of some groups; the reference's states stay whole, since ``state_index`` points into them."""
    rows = (groups[:, None] * size + torch.arange(size)).flatten().to(experience.scores.device)
    batch, values, targets = experience.batch, experience.values, experience.value_targets
    return Experience(
        batch=batch.select(rows),
        scores=experience.scores[rows],
        values=replace(
            values,
            logprob=values.logprob[rows],
            reference_logprob=values.reference_logprob[rows],
            kl=values.kl[rows],
            entropy=values.entropy[rows],
        ),
        state_index=experience.state_index[rows],
        returns=experience.returns[rows],
        advantages=experience.advantages[rows],
        value_targets=None if targets is None else targets[rows],
    )
