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
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
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
from benchmarks.training.task import LORA_ALPHA, Task
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
    lengths = {} if task.model else {"min_new_tokens": workload.rewrite}  # a real model ends its own sequences
    trainer = trl.GRPOTrainer(
        model=policy,
        peft_config=_lora(task),
        reward_funcs=reward.score,
        args=trl.GRPOConfig(
            output_dir=str(task.directory / "trl"),
            per_device_train_batch_size=workload.prompts * workload.K,
            num_generations=workload.K,
            max_completion_length=workload.rewrite,
            generation_kwargs=lengths,
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
        train_dataset=Dataset.from_list([{"prompt": _prompt(task, text)} for text in task.prompts]),
        processing_class=AutoTokenizer.from_pretrained(task.prompter),
    )
    models = {"policy": policy, "target": reward.target}
    if trainer.ref_model is not None:
        models["reference"] = trainer.ref_model
    switch = next((module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)), None)
    counter = TokenCounter(
        models,
        name_now=lambda name: "reference" if name == "policy" and switch and switch.disable_adapters else name,
    )
    trainer.add_callback(_StepClock(reward, trainer.ref_model, switch, counter, after_step))
    trainer.train()


def _lora(task: Task) -> LoraConfig | None:
    """The adapter of this project's default configuration."""
    if task.lora is None:
        return None
    return LoraConfig(r=task.lora, lora_alpha=int(LORA_ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")


def _prompt(task: Task, text: str) -> str | list[dict[str, str]]:
    """A prompt as the trainer takes it: with a real model, a user's turn in its chat template."""
    return [{"role": "user", "content": text}] if task.model else task.meta_prompt + text


class _TargetReward:
    """The mean reward of the target's M responses to each rewrite."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task = task
        self._tokenizer = AutoTokenizer.from_pretrained(task.target)
        target: Any = AutoModelForCausalLM.from_pretrained(task.target, dtype=torch.float32, attn_implementation="sdpa")
        self.target: Any = target.to(device).requires_grad_(False).eval()
        self.began = self.answered = self.scored = 0.0
        """Times at which the last call began, had all responses, and ended."""

    def score(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """Compute the rewards (B,) of B rewrites, texts or conversations; called by the trainer."""
        self.began = time.perf_counter()
        workload = self._task.workload
        rewrites = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
        chats = [[{"role": "user", "content": rewrite}] for rewrite in rewrites]
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
                pad_token_id=self._tokenizer.pad_token_id,
                **self._ends(),
            )
        responses = self._tokenizer.batch_decode(
            sequences[:, inputs["input_ids"].shape[1] :].tolist(), skip_special_tokens=True
        )
        self.answered = time.perf_counter()
        asked = [prompt for prompt in prompts for _ in range(workload.M)]
        rewards = torch.tensor(variety(asked, responses)).view(-1, workload.M).mean(1).tolist()
        self.scored = time.perf_counter()
        return list(rewards)

    def _ends(self) -> dict[str, Any]:
        """When a response ends: a real model's where it ends them, a random one's at their full length."""
        if self._task.model is None:
            return {"min_new_tokens": self._task.workload.response, "eos_token_id": self._tokenizer.eos_token_id}
        ends = self.target.generation_config.eos_token_id
        return {"eos_token_id": self._tokenizer.eos_token_id if ends is None else ends}


class _StepClock(TrainerCallback):
    """Times whole steps, and their phases from the times at which the reference and the reward function are called."""

    def __init__(
        self,
        reward: _TargetReward,
        reference: PreTrainedModel | None,
        switch: BaseTunerLayer | None,
        counter: TokenCounter,
        after_step: Callable[[Step], None],
    ) -> None:
        self._reward, self._counter, self._after_step = reward, counter, after_step
        self._started = self._referred = 0.0
        if reference is not None:
            reference.register_forward_pre_hook(self._refer)
        elif isinstance(switch, nn.Module):  # the policy without its adapter is the reference
            switch.register_forward_pre_hook(self._refer_without_adapter)

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

    def _refer_without_adapter(self, switch: BaseTunerLayer, _: object) -> None:
        if switch.disable_adapters:
            self._refer()

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
