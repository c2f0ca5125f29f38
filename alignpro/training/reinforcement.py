"""Reinforcement learning of a policy in an environment: the prompter against a frozen target, or RLHF of the target.

prompts x → K samples each (engine) → R of each (environment) → what each action is worth (objectives)
          → loss and gradient in one pass over the head (kernels) → optimizer step (backend)

Several ranks each take a share of a step's prompts, with all their samples; losses, gradients and metrics are sums and
means over all of them, so that the numbers do not depend on how many ranks there are.
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
from alignpro.distributed.frozen import FrozenModels
from alignpro.engine import Chain, Engine, EngineStats, SamplingParams, derive_seed
from alignpro.environment import Environment, Scores
from alignpro.errors import CheckpointError
from alignpro.models import save_pretrained
from alignpro.policy import Policy
from alignpro.sequences import SequenceBatch
from alignpro.training.critic import Critic, ValueModel
from alignpro.training.distribution import Distribution, SingleProcess
from alignpro.training.experience import Experience as Experience
from alignpro.training.experience import join_rows, join_values, no_actions
from alignpro.training.metrics import Metrics, PhaseTimer, append_row, mean_of_updates, weighted_mean
from alignpro.training.step_metrics import logprob_difference, sample_metrics
from alignpro.training.stream import PromptStream


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
        distribution: Over which processes; this one alone when absent.
        kept: Models whose cached prompts stay on an accelerator while the policy is updated: those that are frozen.
        targets: Has the target ready for rollouts; it always is when absent.
        rewards: Has the reward models ready to score; likewise.

    Raises:
        DataError: There is no prompt to learn from, or ranks have different ones.
        ModelError: Ranks have different references.
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
        distribution: Distribution | None = None,
        kept: Sequence[str] = (),
        targets: FrozenModels | None = None,
        rewards: FrozenModels | None = None,
    ) -> None:
        distribution = distribution or SingleProcess()
        self.ranks, self._graphs_last = distribution.ranks, distribution.graphs_last
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
        """Tokens of a sample: the mean of the last step, once there is one."""

    @property
    def updates(self) -> int:
        """Optimizer steps made so far."""
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        """Sample K chains of each prompt, score them, credit their actions, update the policy."""
        timer = PhaseTimer(lambda phase: self.ranks.note(f"step {step + 1}, {phase}"))
        before = self.engine.stats.snapshot()
        prompts = self.stream.batch(step)
        mine = self._share(prompts)
        prompts = [prompts[i] for i in mine]
        seeds = [derive_seed(self.run.seed, step, i) for i in mine]
        with timer("rollout"), self.sampled.whole(), self.ranks.together(), self._targets.ready():
            chains = self.environment.rollout(self.engine, prompts, self.sampling, seeds)
            if self.policy.model.device.type != "cpu":
                self.engine.release(keep=self.kept)  # the update needs the accelerator's memory
        with timer("reward"), self.ranks.together(), self._rewards.ready():
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
        self.baseline.update(self.ranks.gather(experience.returns[:, 0]).mean().item())
        if step % self.run.sample_every == 0 and self.ranks.first:
            self._write_sample(step, prompts[0], scores)
        stats = EngineStats.merged(self.ranks.exchange(self.engine.stats.since(before)))
        return metrics | stats.metrics() | timer.seconds

    def credit(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]], scores: Scores) -> Experience:
        """What each action is worth: rewards after it, less a baseline that does not depend on it."""
        objective = self.objective
        batch = SequenceBatch.build(
            [ids for prompt in prompts for ids in [self.environment.encode(prompt)] * self.sampling.n],
            [chain.sample.tokens for group in chains for chain in group],
            self.policy.model.device,
        )
        width = batch.mask.shape[1]
        micro_batches = list(self._micro_batches(len(batch)))
        padded = self._padded([batch.rows(*rows) for rows in micro_batches])
        # One micro-batch is all that the first update passes over, at the weights of now: its graph is kept for that.
        keep = len(padded) == 1 and objective.loss != "gibbs" and objective.minibatches == 1 and self._graphs_last
        with self._reference.ready():
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
        """Epochs over the rollout in minibatches of whole groups, shuffled anew each epoch; one optimizer step each.

        Args:
            experience: Of this rank.
            step: Seeds the shuffle.
            mine: The places that this rank's groups have among those of all ranks.
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
        """Gradients of a minibatch, micro-batch by micro-batch; as many passes on every rank.

        Args:
            minibatch: This rank's part of it.
            states: (N, D) of all its actions, if they are known.
        """
        objective, total = self.objective, 0.0
        details: list[Metrics] = []
        tokens: list[int] = []
        scale = 1.0 / max(self.ranks.sum(objectives.loss_count(minibatch.batch.mask, objective.normalize_by)), 1.0)
        rows_of_all = self.ranks.sum(len(minibatch.batch))
        parts = [(minibatch, start, stop) for start, stop in self._micro_batches(len(minibatch.batch))]
        missing = self.ranks.most(len(parts)) - len(parts)
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
        """Reward and KL of one sample for each of some held-out prompts."""
        prompts = self.heldout[: self.run.eval_prompts]
        if not prompts:
            return {}
        mine = self._share(prompts)
        seeds = [derive_seed(self.run.seed, "evaluate", i) for i in mine]
        own = [prompts[i] for i in mine]
        chains: list[list[Chain]] = []
        values, parts = torch.empty(0, 1), []
        with self.sampled.whole(), self.ranks.together(), self._targets.ready():
            if own:
                chains = self.environment.rollout(self.engine, own, replace(self.sampling, n=1), seeds)
        with self.ranks.together(), self._rewards.ready():
            if own:
                values = self.environment.score(own, chains).values
                encoded = [self.environment.encode(prompt) for prompt in own]
                samples = [group[0].sample.tokens for group in chains]
                batch = SequenceBatch.build(encoded, samples, self.policy.model.device)
                parts = [batch.rows(*rows) for rows in self._micro_batches(len(batch))]
        with self._reference.ready():
            kl = sum(self.policy.token_values(part).kl.sum().item() for part in self._padded(parts))
        reward = self.ranks.gather(values).mean().item()
        return {"eval/reward": reward, "eval/kl": self.ranks.sum(kl) / len(prompts)}

    def save(self, directory: Path) -> dict[str, Any]:
        """Weights and optimizers; the rest of the state."""
        self.backend.save(directory, "policy")
        if self.critic is not None:
            self.critic.backend.save(directory, "critic")
        return {
            "reference": self.ranks.on_first(self.policy.reference_id),
            "data": self.stream.fingerprint,
            "kl": self.kl.state_dict(),
            "baseline": self.baseline.state_dict(),
            "expected_length": self._expected_length,
        }

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Take up what `save` left.

        Raises:
            CheckpointError: The reference or the data is not what the run started with.
        """
        reference = self.ranks.on_first(self.policy.reference_id)
        with self.ranks.together():
            self.stream.check(state["data"])
            if state["reference"] != reference:
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
        self._expected_length = float(state["expected_length"])

    def export(self, directory: Path) -> None:
        """Write the model (or its adapter) and the tokenizer, whole: rank 0 does."""
        with self.sampled.whole() as model:
            if self.ranks.first:
                save_pretrained(model, directory)

    def _micro_batches(self, rows: int) -> Iterator[tuple[int, int]]:
        """Row ranges (start, stop) of at most ``micro_batch_size`` rows; of whole groups where they fit."""
        size = self.optimizer.micro_batch_size
        # A group's prompt is computed once in a micro-batch; and Gibbs compares within a group, however large it is.
        if size >= self.sampling.n or self.objective.loss == "gibbs":
            size = max(1, size // self.sampling.n) * self.sampling.n
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

    def _padded(self, parts: list[SequenceBatch]) -> list[SequenceBatch]:
        """The same, and as many without actions behind them as make every rank have as many."""
        missing = self.ranks.most(len(parts)) - len(parts)
        return parts + [no_actions(1, self.policy.model.device, self.policy.model.invocation)] * missing

    def _share(self, prompts: Sequence[Prompt]) -> list[int]:
        """The indices of the prompts that are this rank's: the tokens to be computed are nearly even."""
        if self.ranks.size == 1:
            return list(range(len(prompts)))
        sampled = self.sampling.n * self._expected_length
        return self.ranks.share([len(self.environment.encode(prompt)) + sampled for prompt in prompts])

    def _minibatches(self, groups: int, step: int, epoch: int) -> list[Tensor]:
        """Indices of groups, split evenly; in order when there is one minibatch, so that nothing is shuffled in vain."""
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
