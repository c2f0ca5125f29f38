"""Reinforcement learning of a policy in an environment: the prompter against a frozen target, or RLHF of the target.

prompts x → K samples each (engine) → R of each (environment) → advantage of each action (objectives)
          → loss and gradient in one pass over the head (kernels) → optimizer step (backend)

Under a launcher, each process takes a share of a step's prompts with all their samples. Losses, gradients and metrics are
sums and means over all processes, so results do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignpro import objectives
from alignpro.config import ObjectiveConfig, OptimizerConfig, RunConfig
from alignpro.data import Prompt
from alignpro.distributed.sharding.frozen import FrozenModels
from alignpro.distributed.sharding.gathered_model import SamplingModel
from alignpro.engine import Chain, Engine, SamplingParams, derive_seed
from alignpro.environments.base import Environment, Scores
from alignpro.models.saving import save_pretrained
from alignpro.policy.policy import Policy
from alignpro.prompting.memory_context import MemoryContext
from alignpro.targets.base import Responder
from alignpro.targets.servers import NO_SERVERS, Servers
from alignpro.training.assignment import PromptAssignment
from alignpro.training.critic import Critic, ValueModel
from alignpro.training.distribution import Distribution, SingleProcess
from alignpro.training.experience import Experience, join_rows, join_values, sample_batch
from alignpro.training.gradient_accumulation import GradientAccumulation, split_minibatches
from alignpro.training.heldout_evaluation import HeldoutEvaluation
from alignpro.training.limited_updates import LimitedUpdates
from alignpro.training.metrics import Evaluation, Metrics, mean_of_updates
from alignpro.training.objective import build_objective
from alignpro.training.resampler import Resampler
from alignpro.training.resume import RunInputs
from alignpro.training.rollouts import Rollouts, SamplingAhead
from alignpro.training.step_memory import StepMemory
from alignpro.training.step_metrics import StepMetrics
from alignpro.training.step_phases import StepPhases
from alignpro.training.stream import PromptStream


class RLTrainer:
    """Trains a policy in steps: sample, score, compute advantages, update. The same for every algorithm and environment.

    Args:
        policy: The policy to train.
        environment: Scores the policy's samples.
        engine: Generates the samples from its model ``policy``, which is that of ``sampling_model``.
        training: Prompts to train on.
        heldout: Prompts to evaluate on.
        sampling: Sampling parameters of the policy; ``n`` is K, the number of samples per prompt.
        prompts_per_step: P.
        objective: The loss and its advantages.
        optimizer: Learning rate, schedule, micro-batches.
        run: Steps, seed, directory.
        distribution: How training is distributed over processes; by default this process trains alone.
        sampling_model: The model that the engine samples from; by default the policy's own.
        keep_cached: Frozen models of the engine, whose cached prompts stay on an accelerator while the policy is updated.
        targets: Materializes the target for rollouts; by default it always is.
        rewards: Materializes the reward models to score; by default they always are.
        responder: What responds to the samples in the environment, for its metrics and its state.
        ahead: Samples are drawn in the step before, and importance weights correct the gradient; by default in their own.
        servers: The job's servers, for the metrics of those that rewards ask.
        memory: Past rewrites that the environment shows, to which each step's are added.
        heldout_environment: Scores what is evaluated; by default the environment of training.

    Raises:
        ConfigError: The loss or the advantage cannot be loaded, or they do not fit together.
        DataError: There are no prompts to train on, or ranks have different prompts.
        ModelError: Ranks have different references.
    """

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
        sampling_model: SamplingModel | None = None,
        keep_cached: Sequence[str] = (),
        targets: FrozenModels | None = None,
        rewards: FrozenModels | None = None,
        responder: Responder | None = None,
        ahead: SamplingAhead | None = None,
        servers: Servers = NO_SERVERS,
        memory: MemoryContext | None = None,
        heldout_environment: Environment | None = None,
    ) -> None:
        distribution = distribution or SingleProcess()
        ranks = distribution.ranks
        self.environment, self.engine, self.heldout, self.keep_cached = environment, engine, heldout, keep_cached
        self.sampling, self.objective, self.optimizer, self.run = sampling, objective, optimizer, run
        self.loss, self.advantage, self.kl = build_objective(objective, sampling.n, ahead is not None)
        self.stream = PromptStream(training, prompts_per_step, run.seed)
        self.inputs = RunInputs(ranks, policy, self.stream)
        self.inputs.check_ranks()

        updates = run.steps * objective.epochs * objective.minibatches
        reference = distribution.frozen_reference(policy)
        value_model = ValueModel(policy.model) if self.advantage.needs_critic else None
        self.sampled = sampling_model or SamplingModel(policy.model)
        module, self.backend = distribution.backend(policy.module, optimizer, updates)
        self.policy = policy.wrapped_by(module, split_prompts=not distribution.lockstep)
        self._backends, self.critic = {"policy": self.backend}, None
        if value_model is not None:
            self.critic = Critic(*distribution.backend(value_model, optimizer, updates), ranks)
            self._backends["critic"] = self.critic.backend
        self.accumulate = GradientAccumulation(
            self.policy, self.loss, self.backend, self.critic, objective, sampling.n, optimizer.rows_per_pass, ranks
        )
        self.resampler = Resampler(ranks, sampling.n, run.seed)
        self.limited = LimitedUpdates(self.policy, self.backend, self.accumulate, objective, optimizer, ranks)
        targets, rewards = targets or FrozenModels(), rewards or FrozenModels()
        contexts = {
            "rollout": (self.sampled.gathered, targets.materialized, ranks.raise_together),
            "reward": (rewards.materialized, ranks.raise_together),
            "credit": (reference.materialized,),
            "update": (),
        }
        self.phase = StepPhases(ranks, contexts)
        self.assign = PromptAssignment(ranks, environment.encode, sampling.max_tokens)
        self.rollouts = Rollouts(ranks, environment, engine, self.assign, self.stream, sampling, run, ahead)
        self.memory = None if memory is None else StepMemory(ranks, memory, run.out)
        self.measure = StepMetrics(ranks, responder, servers)
        self.evaluation = HeldoutEvaluation(
            heldout_environment or environment,
            engine,
            self.accumulate,
            sampling,
            run.seed,
            objective.kl.coef,
            self.phase,
            self.assign,
            ranks,
        )
        self.progress_metrics = ("reward/mean", "kl", "entropy", *self.measure.of_servers)
        self._can_keep_graph = distribution.can_keep_graph and self.loss.per_token and objective.minibatches == 1
        self._raise_together, self._writes_files = ranks.raise_together, ranks.is_rank_zero

    @property
    def updates(self) -> int:
        """Optimizer steps made so far."""
        return self.backend.updates

    def step(self, step: int) -> Metrics:
        """Sample K chains for each prompt, score them, compute advantages, update the policy."""
        self.phase.begin(f"step {step + 1}")
        before = self.engine.stats.snapshot()
        with self.phase("rollout"):
            rollout = self.rollouts(step)
            prompts, chains = rollout.prompts, rollout.chains
            if self.policy.model.device.type != "cpu":
                self.engine.release(keep=self.keep_cached)  # the update needs the accelerator's memory
        with self.phase("reward"):
            scores = self.environment.score(prompts, chains)
        with self.phase("credit"):
            experience = self.rollouts.corrected(self.compute_advantages(prompts, chains, scores), chains)
        with self.phase("update"):
            rates = {"learning_rate": self.backend.learning_rate, **self.kl.metrics()}
            metrics = rates | self.update(experience, step, rollout.local)
        metrics |= self.measure(experience, scores, chains, self.engine.stats.since(before), self.kl.coef)
        self.assign.expected_length = metrics["sample/length"]
        moments = self.measure.score_logratio_moments(experience, self.sampling.n)
        self.kl.update(metrics["kl"], self.stream.batch_size * self.sampling.n, *moments)
        self.advantage.update(self.measure.mean_return(experience))
        if step % self.run.sample_every == 0:
            self.measure.write_sample(self.run.out / "samples.jsonl", step, prompts, scores)
        self.rollouts.forget(step)
        if self.memory is not None:
            metrics |= self.memory.add(step, self.stream.batch(step), rollout.local, prompts, scores)
        return metrics | self.phase.seconds

    def compute_advantages(
        self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]], scores: Scores
    ) -> Experience:
        """Compute the advantage of each action: the rewards after it, minus a baseline that does not depend on it."""
        batch = sample_batch(self.environment.encode, prompts, chains, self.policy.model.device)
        mask, width = batch.mask, batch.mask.shape[1]
        passes = self.accumulate.passes(batch)
        # If the first update consists of one micro-batch, its pass is this one, with the same weights: keep the graph.
        keep = len(passes) == 1 and self._can_keep_graph
        parts = [self.policy.token_stats(part, keep_states=keep) for part in passes]
        values = parts[0] if keep else join_values(parts, len(batch), width)
        R = scores.values.flatten().to(values.logprob)  # (B,)
        rewards, final = self.kl.penalize(R, mask, values.kl, values.logratio)
        rewards = rewards + objectives.entropy_rewards(values.entropy, mask, self.objective.entropy_coef).to(R)
        returns = objectives.returns_to_go(rewards, mask)
        estimates = None if self.critic is None else join_rows(self.critic.values(passes), len(batch), width)
        sampled = objectives.SampledReturns(rewards, returns, mask, R, self.sampling.n, estimates, final)
        advantages = self.advantage(sampled)
        return Experience(
            batch=batch,
            scores=R,
            values=values,
            state_index=batch.scatter(torch.arange(int(mask.sum()), device=R.device)),
            returns=returns,
            advantages=advantages,
            weights=self.advantage.weights(sampled),
            value_targets=None if estimates is None else advantages + estimates.to(advantages.dtype),
        )

    def update(self, experience: Experience, step: int, local: Sequence[int]) -> Metrics:
        """Update the policy in epochs over the rollout, with one optimizer step per minibatch.

        Minibatches consist of whole groups, reshuffled in each epoch.

        Args:
            experience: The rollout of this process's groups.
            step: Seeds the shuffles.
            local: The indices of these groups among those of the step.
        """
        rollout, groups_of_rollout = experience, local
        count, size, chosen = self.stream.batch_size, self.sampling.n, dict[str, float]()
        if isinstance(self.loss, objectives.Distillation):
            size = self.loss.samples
            experience, local, count, chosen = self.resampler(self.loss, experience, step, local, self.kl.coef)
        minibatches = min(self.objective.minibatches, count)
        self.limited.begin(rollout, step, groups_of_rollout, self.sampling.n, self.objective.epochs * minibatches)
        updates, place = list[Metrics](), {group: i for i, group in enumerate(local)}
        for groups in self._minibatches(step, count, minibatches):
            rows = torch.tensor([place[g] for g in groups.tolist() if g in place], dtype=torch.int64)
            minibatch = experience.select(rows, size)
            metrics = self.accumulate(minibatch, self.kl, None if updates else experience.values.states)
            metrics["gradient_norm"] = self.limited()
            self.engine.weights_updated("policy")
            if self.critic is not None:
                metrics |= self.critic.step()
            updates.append(metrics)
        planned = self.objective.epochs * self.objective.minibatches
        for backend in self._backends.values():  # the schedule is one of steps, whatever each has to learn from
            backend.skip(planned - len(updates))
        if planned > 1:
            chosen["updates"] = float(len(updates))
        made = mean_of_updates(updates, self.optimizer.max_grad_norm) if updates else {}
        return chosen | made | self.limited.end()

    def _minibatches(self, step: int, count: int, minibatches: int) -> Iterator[Tensor]:
        """The groups of each update on a rollout, until the policy has gone as far as a step may."""
        for epoch in range(self.objective.epochs if count else 0):
            for groups in split_minibatches(count, minibatches, derive_seed(self.run.seed, "minibatch", step, epoch)):
                if self.limited.exhausted:
                    return
                yield groups

    def evaluate(self, step: int) -> Evaluation:
        """Compute reward, KL and objective of one sample for each held-out prompt."""
        if not self.heldout:
            return Evaluation()
        made = self.evaluation(self.heldout)
        return Evaluation(made.metrics | self.measure.of_evaluation(), made.objective)

    def save(self, directory: Path) -> dict[str, Any]:
        """Write weights and optimizers; returns the rest of the state."""
        state = self.inputs.fingerprints()  # a collective, so before anything can fail on one rank
        for name, backend in self._backends.items():
            with self._raise_together():  # the next one's writing is a collective, too
                backend.save(directory, name)
        self.rollouts.save(directory)
        if self.memory is not None:
            self.memory.save(directory)
        learned = {"kl": self.kl.state_dict(), "baseline": self.advantage.state_dict(), **self.measure.state_dict()}
        learned |= self.limited.state_dict()
        return {**state, **learned, "expected_length": self.assign.expected_length}

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Restore the state that `save` wrote.

        Raises:
            CheckpointError: The reference or the data is not that with which the run started.
        """
        self.inputs.check(directory, state)
        for name, backend in self._backends.items():
            backend.load(directory, name)
        self.engine.weights_updated("policy")
        self.kl.load_state_dict(state["kl"])
        self.advantage.load_state_dict(state["baseline"])
        self.assign.expected_length = float(state["expected_length"])
        self.measure.load_state_dict(state)
        self.rollouts.load(directory)
        if self.memory is not None:
            self.memory.load(directory)
        self.limited.load_state_dict(state)

    def export(self, directory: Path) -> None:
        """Write the whole model (or its adapter) and the tokenizer, from one process."""
        with self.sampled.gathered() as model:
            if self._writes_files:
                save_pretrained(model, directory)
                self.environment.write_card(directory, self.sampling.max_tokens)
