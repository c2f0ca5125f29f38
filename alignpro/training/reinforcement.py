"""Reinforcement learning of a policy in an environment: the prompter against a frozen target, or RLHF of the target.

prompts x → K samples each (engine) → R of each (environment) → advantage of each action (objectives)
          → loss and gradient in one pass over the head (kernels) → optimizer step (backend)

With several ranks, each takes a share of a step's prompts with all their samples. Losses, gradients and metrics are sums
and means over all ranks, so results do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro import objectives
from alignpro.config import ObjectiveConfig, OptimizerConfig, RunConfig
from alignpro.data import Prompt
from alignpro.distributed.sharding.frozen import FrozenModels
from alignpro.engine import Chain, Engine, EngineStats, SamplingParams, derive_seed
from alignpro.environments.base import Environment, Scores
from alignpro.models.loading import save_pretrained
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.training.critic import Critic, ValueModel
from alignpro.training.distribution import Distribution, SingleProcess
from alignpro.training.experience import Experience, join_rows, join_values, no_actions
from alignpro.training.loggers.jsonl import append_row
from alignpro.training.metrics import Metrics, PhaseTimer, mean_of_updates, weighted_mean
from alignpro.training.resume import check_data, check_reference
from alignpro.training.step_metrics import logprob_difference, sample_metrics
from alignpro.training.stream import PromptStream


class RLTrainer:
    """Trains a policy in steps: sample, score, credit, update. The same for every loss, policy and environment.

    Args:
        policy: The policy to train.
        environment: Scores the policy's samples.
        engine: Generates the samples; the constructor sets its model ``policy`` to the policy's sampling model.
        training: Prompts to train on.
        heldout: Prompts to evaluate on.
        sampling: Sampling parameters of the policy; ``n`` is K, the number of samples per prompt.
        prompts_per_step: P.
        objective: The loss and its advantages.
        optimizer: Learning rate, schedule, micro-batches.
        run: Steps, seed, directory.
        distribution: How training is distributed over processes; by default this process trains alone.
        kept: Frozen models of the engine, whose cached prompts stay on an accelerator while the policy is updated.
        targets: Makes the target ready for rollouts; by default it always is.
        rewards: Makes the reward models ready to score; by default they always are.

    Raises:
        DataError: There are no prompts to train on, or ranks have different prompts.
        ModelError: Ranks have different references.
    """

    progress_metrics: tuple[str, ...] = ("reward/mean", "kl", "entropy")

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
        distribution: Distribution | None = None,
        kept: Sequence[str] = (),
        targets: FrozenModels | None = None,
        rewards: FrozenModels | None = None,
    ) -> None:
        distribution = distribution or SingleProcess()
        self.ranks, self._graphs_last = distribution.ranks, distribution.can_keep_graph
        self.policy, self.environment, self.engine = policy, environment, engine
        policy.splits_prompts = not distribution.equal_passes
        self._targets, self._rewards = targets or FrozenModels(), rewards or FrozenModels()
        self.stream = PromptStream(training, prompts_per_step, run.seed)
        self.heldout, self.kept = heldout, kept
        self.sampling, self.objective, self.optimizer, self.run = sampling, objective, optimizer, run
        updates = run.steps * objective.epochs * objective.minibatches
        if self.ranks.group is not None:
            self.stream.check_ranks(self.ranks)
            policy.check_ranks(self.ranks)
        self._reference = distribution.frozen_reference(policy)
        value_model = ValueModel(policy.model) if objective.advantage == "gae" else None
        self.sampled = distribution.sampling_model(policy.model)
        engine.models["policy"] = self.sampled.model
        policy.wrapped, self.backend = distribution.backend(policy.module, optimizer, updates)
        self.critic: Critic | None = None
        if value_model is not None:
            self.critic = Critic(*distribution.backend(value_model, optimizer, updates))
        self.kl = objectives.AdaptiveKL(objective.kl.coef, objective.kl.target, objective.kl.horizon)
        self.baseline = objectives.RunningBaseline(objective.baseline_decay)
        self._expected_length = float(sampling.max_tokens)
        """Expected tokens per sample: the mean of the last step, or the maximum before the first step."""

    @property
    def updates(self) -> int:
        """Optimizer steps made so far."""
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        """Sample K chains for each prompt, score them, compute advantages, update the policy."""
        timer = PhaseTimer(lambda phase: self.ranks.note(f"step {step + 1}, {phase}"))
        before = self.engine.stats.snapshot()
        prompts = self.stream.batch(step)
        mine = self._share(prompts)
        prompts = [prompts[i] for i in mine]
        seeds = [derive_seed(self.run.seed, step, i) for i in mine]
        with timer("rollout"), self.sampled.gathered(), self.ranks.raise_together(), self._targets.materialized():
            chains = self.environment.rollout(self.engine, prompts, self.sampling, seeds)
            if self.policy.model.device.type != "cpu":
                self.engine.release(keep=self.kept)  # the update needs the accelerator's memory
        with timer("reward"), self.ranks.raise_together(), self._rewards.materialized():
            scores = self.environment.score(prompts, chains)
        with timer("credit"):
            experience = self.credit(prompts, chains, scores)
        with timer("update"):
            metrics = {"learning_rate": self.backend.learning_rate, "kl_coef": self.kl.coef}
            metrics |= self.update(experience, step, mine)
        metrics |= sample_metrics(self.ranks, experience, scores)
        metrics |= logprob_difference(self.ranks, experience, chains)
        self._expected_length = metrics["sample/length"]
        self.kl.update(metrics["kl"], int(self.ranks.sum(len(experience.scores))))
        self.baseline.update(self.ranks.all_gather(experience.returns[:, 0]).mean().item())
        if step % self.run.sample_every == 0 and self.ranks.is_rank_zero:
            self._write_sample(step, prompts[0], scores)
        stats = EngineStats.merged(self.ranks.all_gather_object(self.engine.stats.since(before)))
        return metrics | stats.metrics() | timer.seconds

    def credit(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]], scores: Scores) -> Experience:
        """Compute the advantage of each action: the rewards after it, minus a baseline that does not depend on it."""
        objective = self.objective
        batch = SequenceBatch.build(
            [ids for prompt in prompts for ids in [self.environment.encode(prompt)] * self.sampling.n],
            [chain.sample.tokens for group in chains for chain in group],
            self.policy.model.device,
        )
        width = batch.mask.shape[1]
        micro_batches = list(self._micro_batches(len(batch)))
        padded = self._padded([batch.rows(*rows) for rows in micro_batches])
        # If the first update consists of one micro-batch, its pass is this one, with the same weights: keep the graph.
        keep = len(padded) == 1 and objective.loss != "gibbs" and objective.minibatches == 1 and self._graphs_last
        with self._reference.materialized():
            parts = [self.policy.token_values(part, keep_states=keep) for part in padded]
        values = parts[0] if keep else join_values(parts[: len(micro_batches)], width)
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
            estimates = join_rows(self.critic.values(padded)[: len(micro_batches)], width)
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

    def update(self, experience: Experience, step: int, mine: Sequence[int]) -> Metrics:
        """Update the policy in epochs over the rollout, with one optimizer step per minibatch.

        Minibatches consist of whole groups, reshuffled in each epoch.

        Args:
            experience: This rank's rollout.
            step: Seeds the shuffles.
            mine: Indices of this rank's groups among those of all ranks.
        """
        updates: list[Metrics] = []
        total = int(self.ranks.sum(len(mine)))
        place = {group: i for i, group in enumerate(mine)}
        for epoch in range(self.objective.epochs):
            for groups in self._minibatches(total, step, epoch):
                here = torch.tensor([place[g] for g in groups.tolist() if g in place], dtype=torch.int64)
                minibatch = experience.select(here, self.sampling.n)
                metrics = self._backward(minibatch, None if updates else experience.values.states)
                metrics["gradient_norm"] = self.backend.step()
                self.engine.weights_updated("policy")
                if self.critic is not None:
                    metrics |= self.critic.step()
                    metrics["value_loss"] = self.ranks.sum(metrics["value_loss"])
                updates.append(metrics)
        return mean_of_updates(updates)

    def _backward(self, minibatch: Experience, states: Tensor | None = None) -> Metrics:
        """Add the gradients of a minibatch, one micro-batch at a time; every rank makes the same number of passes.

        Args:
            minibatch: This rank's part of the minibatch.
            states: (N, D) hidden states of all its actions, if they have been computed already.
        """
        objective, total = self.objective, 0.0
        details: list[Metrics] = []
        tokens: list[int] = []
        scale = 1.0 / max(self.ranks.sum(objectives.loss_count(minibatch.batch.mask, objective.normalize_by)), 1.0)
        rows_of_all = self.ranks.sum(len(minibatch.batch))
        parts = [(minibatch, start, stop) for start, stop in self._micro_batches(len(minibatch.batch))]
        missing = self.ranks.reduce_max(len(parts)) - len(parts)
        if missing:
            parts += [
                (minibatch.without_actions(self.sampling.n, self.policy.model.invocation), 0, self.sampling.n)
            ] * missing
        for minibatch, start, stop in parts:
            batch = minibatch.batch.rows(start, stop)
            width = batch.mask.shape[1]
            if objective.loss == "gibbs":
                loss = objectives.gibbs_loss(
                    self.policy.sequence_logprob(batch),
                    minibatch.values.reference_logprob[start:stop].sum(1),
                    minibatch.scores[start:stop],
                    self.sampling.n,
                    self.kl.coef,
                ) * ((stop - start) / rows_of_all)
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
                if len(rows.advantages):
                    details.append(coefficients.metrics())
                    tokens.append(len(rows.advantages))
            self.backend.backward(loss)
            total += loss.item()
            if self.critic is not None and minibatch.value_targets is not None:
                targets = minibatch.value_targets[start:stop, :width]
                self.critic.backward(batch, targets, scale * objective.value_coef)
        return {"loss": self.ranks.sum(total), **self.ranks.mean(weighted_mean(details, tokens), sum(tokens))}

    @torch.no_grad()
    def evaluate(self, step: int) -> Metrics:
        """Compute reward and KL of one sample for each of at most ``run.eval_prompts`` held-out prompts."""
        prompts = self.heldout[: self.run.eval_prompts]
        if not prompts:
            return {}
        mine = self._share(prompts)
        seeds = [derive_seed(self.run.seed, "evaluate", i) for i in mine]
        own = [prompts[i] for i in mine]
        chains: list[list[Chain]] = []
        values, parts = torch.empty(0, 1), []
        with self.sampled.gathered(), self.ranks.raise_together(), self._targets.materialized():
            if own:
                chains = self.environment.rollout(self.engine, own, replace(self.sampling, n=1), seeds)
        with self.ranks.raise_together(), self._rewards.materialized():
            if own:
                values = self.environment.score(own, chains).values
                encoded = [self.environment.encode(prompt) for prompt in own]
                samples = [group[0].sample.tokens for group in chains]
                batch = SequenceBatch.build(encoded, samples, self.policy.model.device)
                parts = [batch.rows(*rows) for rows in self._micro_batches(len(batch))]
        with self._reference.materialized():
            kl = sum(self.policy.token_values(part).kl.sum().item() for part in self._padded(parts))
        reward = self.ranks.all_gather(values).mean().item()
        return {"eval/reward": reward, "eval/kl": self.ranks.sum(kl) / len(prompts)}

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizers; returns the rest of the state."""
        self.backend.save(directory, "policy")
        if self.critic is not None:
            self.critic.backend.save(directory, "critic")
        return {
            "reference": self.ranks.on_rank_zero(self.policy.reference_id),
            "data": self.stream.fingerprint,
            "kl": self.kl.state_dict(),
            "baseline": self.baseline.state_dict(),
            "expected_length": self._expected_length,
        }

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote.

        Raises:
            CheckpointError: The reference or the data is not that with which the run started.
        """
        reference = self.ranks.on_rank_zero(self.policy.reference_id)
        with self.ranks.raise_together():
            check_data(state["data"], self.stream.fingerprint)
            check_reference(directory, state["reference"], reference)
        self.backend.load(directory, "policy")
        self.engine.weights_updated("policy")
        if self.critic is not None:
            self.critic.backend.load(directory, "critic")
        self.kl.load_state_dict(state["kl"])
        self.baseline.load_state_dict(state["baseline"])
        self._expected_length = float(state["expected_length"])

    def export(self, directory: Path) -> None:
        """Write the whole model (or its adapter) and the tokenizer from rank 0."""
        with self.sampled.gathered() as model:
            if self.ranks.is_rank_zero:
                save_pretrained(model, directory)

    def _micro_batches(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield row ranges (start, stop) of at most ``micro_batch_size`` rows, made of whole groups if these fit."""
        size = self.optimizer.micro_batch_size
        # A group's prompt is computed once per micro-batch. The Gibbs loss needs whole groups, whatever their size.
        if size >= self.sampling.n or self.objective.loss == "gibbs":
            size = max(1, size // self.sampling.n) * self.sampling.n
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

    def _padded(self, parts: list[SequenceBatch]) -> list[SequenceBatch]:
        """Append batches without actions until all ranks have the same number of batches."""
        missing = self.ranks.reduce_max(len(parts)) - len(parts)
        return parts + [no_actions(1, self.policy.model.device, self.policy.model.invocation)] * missing

    def _share(self, prompts: Sequence[Prompt]) -> list[int]:
        """Indices of this rank's prompts, chosen so that the ranks compute nearly the same number of tokens."""
        if self.ranks.size == 1:
            return list(range(len(prompts)))
        sampled = self.sampling.n * self._expected_length
        return self.ranks.assign_balanced([len(self.environment.encode(prompt)) + sampled for prompt in prompts])

    def _minibatches(self, groups: int, step: int, epoch: int) -> list[Tensor]:
        """Split the indices of groups evenly into minibatches; shuffled unless there is only one."""
        order = torch.arange(groups)
        if self.objective.minibatches > 1:
            generator = torch.Generator().manual_seed(derive_seed(self.run.seed, "minibatch", step, epoch))
            order = torch.randperm(groups, generator=generator)
        return list(order.tensor_split(self.objective.minibatches))

    def _write_sample(self, step: int, prompt: Prompt, scores: Scores) -> None:
        row = {
            "step": step + 1,
            "prompt": prompt.text,
            "sample": scores.samples[0][0],
            "responses": scores.responses[0][0],
            "value": scores.values[0][0].item(),
        }
        append_row(self.run.out / "samples.jsonl", row)
