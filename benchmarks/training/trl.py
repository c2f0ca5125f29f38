"""The recipe with TRL: its GRPO trainer, with a reward function that queries the target by transformers' `generate`.

Written against TRL 1.16.0. The trainer's defaults are used except for what the task specifies, gradient checkpointing (on
by default, and slower) and the floating-point format (bfloat16 by default). Logging is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.measure import import_peer
from benchmarks.training.reward import variety
from benchmarks.training.step import Step
from benchmarks.training.task import Task
from benchmarks.training.tokens import TokenCounter


def train(task: Task, device: torch.device, after_step: Callable[[Step], None]) -> None:
    """Run all steps of a task; ``after_step`` is called after each step, outside of the measured time.

    Raises:
        SkippedError: TRL is not installed, or its import fails.
    """
    trl: Any = import_peer("trl")

    workload = task.workload
    reward = _TargetReward(task, device)
    policy = AutoModelForCausalLM.from_pretrained(task.prompter, dtype=torch.float32, attn_implementation="sdpa")
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=reward.score,
        args=trl.GRPOConfig(
            output_dir=str(task.directory / "trl"),
            per_device_train_batch_size=workload.prompts * workload.K,
            num_generations=workload.K,
            max_completion_length=workload.rewrite,
            generation_kwargs={"min_new_tokens": workload.rewrite},
            max_steps=task.steps,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            beta=task.kl_coef,
            seed=task.seed,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": task.meta_prompt + text} for text in task.prompts]),
        processing_class=AutoTokenizer.from_pretrained(task.prompter),
    )
    counter = TokenCounter({"policy": policy, "reference": trainer.ref_model, "target": reward.target})
    trainer.add_callback(_StepClock(reward, trainer.ref_model, counter, after_step))
    trainer.train()


class _TargetReward:
    """The mean reward of the target's M responses to each rewrite."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._tokenizer = AutoTokenizer.from_pretrained(task.target)
        target: Any = AutoModelForCausalLM.from_pretrained(task.target, dtype=torch.float32, attn_implementation="sdpa")
        self.target: Any = target.to(device).requires_grad_(False).eval()
        self.began = self.answered = self.scored = 0.0
        """Times at which the last call began, had all responses, and ended."""

    def score(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Compute the rewards (B,) of B rewrites; called by the trainer."""
        self.began = time.perf_counter()
        workload = self._task.workload
        chats = [[{"role": "user", "content": rewrite}] for rewrite in completions]
        inputs: Any = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(self.target.device)
        with torch.no_grad():
            sequences = self.target.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=workload.M,
                max_new_tokens=workload.response,
                min_new_tokens=workload.response,
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=self._tokenizer.eos_token_id,
            )
        responses = self._tokenizer.batch_decode(
            sequences[:, inputs["input_ids"].shape[1] :].tolist(), skip_special_tokens=True
        )
        self.answered = time.perf_counter()
        asked = [prompt for prompt in prompts for _ in range(workload.M)]
        rewards = torch.tensor(variety(asked, responses)).view(-1, workload.M).mean(1).tolist()
        self.scored = time.perf_counter()
        return list(rewards)


class _StepClock(TrainerCallback):
    """Times whole steps, and their phases from the times at which the reference and the reward function are called."""

    def __init__(
        self,
        reward: _TargetReward,
        reference: PreTrainedModel,
        counter: TokenCounter,
        after_step: Callable[[Step], None],
    ) -> None:
        self._reward, self._counter, self._after_step = reward, counter, after_step
        self._started = self._referred = 0.0
        reference.register_forward_pre_hook(self._refer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start timing: the batch of prompts is ready."""
        self._counter.clear()
        self._referred = 0.0
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop timing: the weights are updated."""
        ended, reward = time.perf_counter(), self._reward
        phases = {
            "rollout": self._referred - self._started + reward.answered - reward.began,
            "reward": reward.scored - reward.answered,
            "credit": reward.began - self._referred,
            "update": ended - reward.scored,
        }
        self._after_step(Step(ended - self._started, phases, self._tokens()))

    def _refer(self, *_: object) -> None:
        self._referred = self._referred or time.perf_counter()  # of its first call, if there are several

    def _tokens(self) -> dict[str, int]:
        tokens = {"prefill": 0, "decode": 0, "credit": 0, "update": 0}
        for call, count in self._counter.calls.items():
            if call.model == "reference":
                tokens["credit"] += count
            elif call.grad:
                tokens["update"] += count
            else:
                tokens["decode" if call.width == 1 else "prefill"] += count
        return tokens
