"""The policy: a trainable language model, the frozen reference of its KL penalty, and the passes over both."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignpro.config import PolicyConfig
from alignpro.distributed.ranks import Ranks
from alignpro.errors import ModelError
from alignpro.models.adapters import add_adapter, describe_training
from alignpro.models.head import Head
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_trainable
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.fixed_prefix import policy_and_base_states, policy_states
from alignpro.policy.reference import fingerprint, load_reference
from alignpro.policy.reference_logprobs import (
    TokenStats,
    completion_logprob,
    kl_between_heads,
    policy_and_reference_stats,
    reference_arguments,
)
from alignpro.policy.zero3_module import Outputs, PolicyModule
from alignpro_kernels import Coefficients, PolicyLossOutput, policy_loss

logger = logging.getLogger(__name__)


class Policy:
    """A trainable model and its reference.

    The reference is the model with its adapter switched off if they differ in the adapter alone, else a frozen copy.

    Args:
        model: The trained model; its ``requires_grad`` flags say which weights are trained.
        reference: The frozen reference; None for the model with its adapter switched off.
        temperature: The sampling temperature. ρ and ρ_sft are the distributions at this temperature.
    """

    def __init__(self, model: LanguageModel, reference: LanguageModel | None, *, temperature: float = 1.0) -> None:
        self.model = model
        self.reference = reference
        self.temperature = temperature
        self.module = PolicyModule(model, reference)
        """Both models: every pass over their weights is a forward of it."""
        self._wrapper: nn.Module = self.module
        self._reference_id: str | None = None
        # If only an activated LoRA is trained, the tokens before its invocation are computed by the frozen base model.
        self._split_prompts = bool(model.invocation) and all(".lora_" in name for name in self.trainable)
        self.model.eval()  # no dropout: importance ratios compare the same function at two sets of weights
        if reference is not None:
            reference.requires_grad_(False).eval()

    @classmethod
    def load(cls, config: PolicyConfig, *, seed: int, temperature: float = 1.0) -> Policy:
        """Load the model, add its adapter and choose the reference.

        Raises:
            ModelError: A model cannot be loaded, the adapter does not fit, or model and reference have different
                vocabularies or soft caps of their logits.
        """
        start = load_trainable(config, seed)
        model = add_adapter(start, config.adapter)
        reference = load_reference(config, model, adapter_is_new=model is not start)
        if config.reference not in (None, config.path):
            compared = config.reference
        else:
            compared = "the model without its adapter" if reference is None else "a frozen copy of the start"
        logger.info("%s; reference: %s", describe_training(start, model), compared)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return cls(model, reference, temperature=temperature)

    def wrapped_by(self, wrapper: nn.Module, *, split_prompts: bool) -> Policy:
        """Return a policy of the same models whose passes are forwards of a wrapper of ``module``.

        Args:
            wrapper: Called in place of ``module``, such as DeepSpeed's engine around it.
            split_prompts: Whether prefixes common to both models may be computed in a separate pass, if that pays off for
                a batch. False if all ranks must make the same number of passes.
        """
        policy = copy.copy(self)
        policy._wrapper, policy._split_prompts = wrapper, self._split_prompts and split_prompts
        return policy

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → weight, of all trained weights."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def reference_id(self) -> str:
        """Return a fingerprint of the reference's weights for checkpoints; computed once, since they never change."""
        if self._reference_id is None:
            frozen = self.model.causal if self.reference is None else self.reference
            trained = {id(weight) for weight in self.trainable.values()}
            weights = (item for item in frozen.named_parameters() if id(item[1]) not in trained)
            self._reference_id = fingerprint(weights)
        return self._reference_id

    def check_ranks(self, ranks: Ranks) -> None:
        """Check that all ranks have loaded the same reference: a collective, called before its weights are sharded.

        Raises:
            ModelError: They have not. Training would silently use rank 0's weights everywhere.
        """
        with ranks.raise_together():
            reference = self.reference_id()
        ranks.require_equal(
            reference,
            lambda rank, *_: ModelError(
                f"rank {rank} has loaded a different policy or reference than rank 0 ({self.model.name}): make the files "
                "the same on every node"
            ),
        )

    def token_stats(self, batch: SequenceBatch, *, keep_states: bool = False) -> TokenStats:
        """Compute log-probabilities, exact KL and entropy of every action at the current weights.

        Args:
            batch: The sequences.
            keep_states: Keep the policy's states for a `loss` at the same weights, which then needs no forward pass.
        """
        with torch.set_grad_enabled(keep_states and torch.is_grad_enabled()):
            states, reference_states, *stats = self._wrapper(lambda: self._token_stats(batch))
        logprob, reference_logprob, kl, entropy = map(batch.scatter, stats)
        kept = states if keep_states else None
        return TokenStats(logprob, reference_logprob, kl, entropy, reference_states, states.detach(), states=kept)

    def loss(
        self,
        batch: SequenceBatch,
        coefficients: Coefficients,
        *,
        states: Tensor | None = None,
        reference_states: Tensor | None = None,
        entropy: bool = False,
    ) -> PolicyLossOutput:
        """Compute a loss that is a sum over actions with the fused head; ``coefficients`` defines its terms.

        Args:
            batch: The sequences.
            coefficients: (logprob, entropy, kl, rows) → loss terms and their derivatives; see `Coefficients`.
            states: (N, D) of `TokenStats`, if the weights have not changed since; recomputed if None.
            reference_states: (N, D) of `TokenStats`; if given, ``coefficients`` receives the exact KL.
            entropy: Whether ``coefficients`` receives the entropy.
        """

        def head_loss(states: Tensor) -> PolicyLossOutput:
            head = self.model.head
            reference: dict[str, Any] = {}
            if reference_states is not None:
                reference = reference_arguments(head, self._reference_head(), reference_states)
            return policy_loss(
                states,
                head.weight,
                batch.targets,
                coefficients,
                temperature=self.temperature,
                **head.options,
                entropy=entropy,
                **reference,
            )

        return self._head_pass(batch, head_loss, states)

    def sequence_logprob(self, batch: SequenceBatch) -> Tensor:
        """Compute log ρ(x'|x) of whole sequences, differentiable: (B,)."""
        return self._head_pass(
            batch, lambda states: completion_logprob(self.model.head, states, batch, self.temperature)
        )

    @torch.no_grad()
    def copy_head(self, states: Tensor) -> Head | None:
        """Copy the output layer as it is now; None if it is not trained.

        Args:
            states: (N, D), of any actions.
        """
        if not any(weight.requires_grad for weight in self.module.head.weights()):
            return None

        def copies(states: Tensor) -> tuple[Tensor, ...]:
            head = self.model.head
            return (head.merged.clone(),) if head.bias is None else (head.merged.clone(), head.bias.clone())

        weight, *bias = self._wrapper(lambda: self.module.head(states, copies))
        return Head(weight, bias[0] if bias else None, self.model.head.softcap)

    @torch.no_grad()
    def kl_from(self, batch: SequenceBatch, states: Tensor, head: Head | None) -> Tensor:
        """Compute KL(ρ ‖ ρ_old) at the state before each action, exactly, in nats: (B, T), zero outside the mask.

        Args:
            batch: The sequences.
            states: (N, D) of the policy at the old weights.
            head: Its output layer, as `copy_head` returned it.
        """

        def head_kl(new: Tensor) -> Tensor:
            own = self.model.head
            return kl_between_heads(own, new, own if head is None else head, states, batch.targets, self.temperature)

        return batch.scatter(self._head_pass(batch, head_kl))

    def _head_pass(
        self, batch: SequenceBatch, function: Callable[[Tensor], Outputs], states: Tensor | None = None
    ) -> Outputs:
        """Run ``function``, which reads the head, on the policy's states, (N, D); they are computed if None."""
        outputs: Outputs = self._wrapper(
            lambda: self.module.head(self._states(batch) if states is None else states, function)
        )
        return outputs

    def _token_stats(self, batch: SequenceBatch) -> tuple[Tensor, ...]:
        """Return states of policy and reference, (N, D), then logprob, reference logprob, KL and entropy, (N,) each."""
        states, reference_states = self._both_states(batch)

        def head_stats(states: Tensor) -> tuple[Tensor, ...]:
            return policy_and_reference_stats(
                self.model.head, states, self._reference_head(), reference_states, batch.targets, self.temperature
            )

        with torch.no_grad():
            return states, reference_states, *self.module.head(states.detach(), head_stats)

    def _reference_head(self) -> Head:
        return self.model.base_head if self.reference is None else self.reference.head

    def _states(self, batch: SequenceBatch) -> Tensor:
        """Compute the policy's states, (N, D), differentiable."""
        if self._split_prompts:
            return policy_states(self.model, batch)
        return self.model.action_states(batch)

    def _both_states(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Compute the states of the policy, differentiable, and of the reference, (N, D) each."""
        if self.reference is None and self._split_prompts:
            return policy_and_base_states(self.model, batch)
        states = self._states(batch)
        with torch.no_grad():
            if self.reference is not None:
                return states, self.reference.action_states(batch)
            with self.model.disable_adapter():
                return states, self.model.action_states(batch)
