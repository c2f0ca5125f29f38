"""The policy: a trainable language model, the frozen reference of its KL penalty, and the passes over both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignpro.config import PolicyConfig
from alignpro.distributed.ranks import Ranks
from alignpro.errors import ModelError
from alignpro.models.head import Head
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import add_adapter, fingerprint, frozen_copy, load_language_model, load_trainable
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.fixed_prefix import policy_and_base_states, policy_states
from alignpro.policy.zero3_module import PolicyModule
from alignpro_kernels import Coefficients, PolicyLossOutput, linear_logprob, policy_loss

Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class TokenValues:
    """Per-action results of a pass over sampled sequences; (B, T), zero outside the mask."""

    logprob: Tensor
    """log ρ(a_t|s_t)."""
    reference_logprob: Tensor
    """log ρ_sft(a_t|s_t)."""
    kl: Tensor
    """KL(ρ(·|s_t) ‖ ρ_sft(·|s_t)) over the whole vocabulary, in nats."""
    entropy: Tensor
    """Entropy of ρ(·|s_t), in nats."""
    reference_states: Tensor
    """(N, D): the reference's hidden states, row by row. They do not change while the policy is updated."""
    states: Tensor | None = None
    """(N, D): the policy's hidden states with their autograd graph, if requested; valid until its weights change."""


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
        self.wrapped: nn.Module = self.module
        """The module to call for a pass: ``module`` itself, or a backend's wrapper around it."""
        self.splits_prompts = True
        """Whether prefixes common to both models may be computed in a separate pass, if that pays off for a batch. False
        if all ranks must make the same number of passes."""
        self._reference_id: str | None = None
        # If only an activated LoRA is trained, the tokens before its invocation are computed by the frozen base model.
        self._prefix_is_fixed = bool(model.invocation) and all(".lora_" in name for name in self.trainable)
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
        reference: LanguageModel | None = None
        if config.reference not in (None, config.path):
            reference = load_language_model(config.model_copy(update={"path": config.reference}))
        elif config.adapter.kind == "full" or model is start:  # or training continues on ρ_sft's own adapter
            reference = frozen_copy(model)
        if reference is not None and reference.head.weight.shape[0] != model.head.weight.shape[0]:
            raise ModelError(
                f"reference {reference.name} has {reference.head.weight.shape[0]} vocabulary entries, policy {model.name} "
                f"has {model.head.weight.shape[0]}: KL needs the same vocabulary"
            )
        if reference is not None and reference.head.softcap != model.head.softcap:
            raise ModelError(
                f"reference {reference.name} has final_logit_softcapping={reference.head.softcap}, policy {model.name} "
                f"{model.head.softcap}: their KL is computed in one pass over both heads, which supports a single cap"
            )
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return cls(model, reference, temperature=temperature)

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

    def token_values(self, batch: SequenceBatch, *, keep_states: bool = False) -> TokenValues:
        """Compute log-probabilities, exact KL and entropy of every action at the current weights.

        Args:
            batch: The sequences.
            keep_states: Keep the policy's states for a `loss` at the same weights, which then needs no forward pass.
        """
        with torch.set_grad_enabled(keep_states and torch.is_grad_enabled()):
            states, reference_states, *values = self._pass(lambda: self._token_values(batch))
        logprob, reference_logprob, kl, entropy = (batch.scatter(value) for value in values)
        kept = states if keep_states else None
        return TokenValues(logprob, reference_logprob, kl, entropy, reference_states=reference_states, states=kept)

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
            states: (N, D) of `TokenValues`, if the weights have not changed since; recomputed if None.
            reference_states: (N, D) of `TokenValues`; if given, ``coefficients`` receives the exact KL.
            entropy: Whether ``coefficients`` receives the entropy.
        """

        def fused(states: Tensor) -> PolicyLossOutput:
            head = self.model.head
            reference: dict[str, Any] = {}
            if reference_states is not None:
                reference = _reference_arguments(head, reference_states, self._reference_head())
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

        return self._pass(lambda: self.module.head(self._states(batch) if states is None else states, fused))

    def sequence_logprob(self, batch: SequenceBatch) -> Tensor:
        """Compute log ρ(x'|x) of whole sequences, differentiable: (B,)."""
        return self._pass(
            lambda: self.module.head(
                self._states(batch),
                lambda states: completion_logprob(self.model.head, states, batch, self.temperature),
            )
        )

    def _pass(self, work: Callable[[], Outputs]) -> Outputs:
        """Run ``work``, which uses the weights, inside the module's forward."""
        outputs: Outputs = self.wrapped(work)
        return outputs

    def _token_values(self, batch: SequenceBatch) -> tuple[Tensor, ...]:
        """Return states of policy and reference, (N, D), then logprob, reference logprob, KL and entropy, (N,) each."""
        states, reference_states = self._both_states(batch)

        def fused(states: Tensor) -> tuple[Tensor, ...]:
            head, reference_head, targets = self.model.head, self._reference_head(), batch.targets
            stats = linear_logprob(
                states,
                head.weight,
                targets,
                temperature=self.temperature,
                **head.options,
                entropy=True,
                **_reference_arguments(head, reference_states, reference_head),
            )
            reference_stats = linear_logprob(
                reference_states,
                reference_head.weight,
                targets,
                temperature=self.temperature,
                **reference_head.options,
            )
            assert stats.kl is not None and stats.entropy is not None  # requested above
            return stats.logprob, reference_stats.logprob, stats.kl, stats.entropy

        with torch.no_grad():
            values: tuple[Tensor, ...] = self.module.head(states.detach(), fused)
        return states, reference_states, *values

    def _reference_head(self) -> Head:
        return self.model.base_head if self.reference is None else self.reference.head

    def _states(self, batch: SequenceBatch) -> Tensor:
        """Compute the policy's states, (N, D), differentiable."""
        if self._prefix_is_fixed and self.splits_prompts:
            return policy_states(self.model, batch)
        return self.model.action_states(batch)

    def _both_states(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Compute the states of the policy, differentiable, and of the reference, (N, D) each."""
        if self.reference is None and self._prefix_is_fixed and self.splits_prompts:
            return policy_and_base_states(self.model, batch)
        states = self._states(batch)
        with torch.no_grad():
            if self.reference is not None:
                return states, self.reference.action_states(batch)
            with self.model.adapter_off():
                return states, self.model.action_states(batch)


def sequence_logprob(model: LanguageModel, batch: SequenceBatch, temperature: float) -> Tensor:
    """Compute the log-probability of each whole completion at a temperature, (B,), differentiable."""
    return completion_logprob(model.head, model.action_states(batch), batch, temperature)


def completion_logprob(head: Head, states: Tensor, batch: SequenceBatch, temperature: float) -> Tensor:
    """Compute the same from the states at which the actions were chosen: (N, D) → (B,)."""
    stats = linear_logprob(
        states,
        head.weight,
        batch.targets,
        temperature=temperature,
        **head.options,
    )
    return batch.scatter(stats.logprob).sum(1)


def _reference_arguments(head: Head, states: Tensor, reference: Head) -> dict[str, Any]:
    """Return the reference's keyword arguments for the head operators; a shared head is passed once and read once.

    A trained head is never shared: the reference keeps its own.
    """
    if head.same_as(reference) and reference.lora is None and not head.weight.requires_grad:
        return {"ref_hidden": states}
    return {"ref_hidden": states, "ref_weight": reference.merged, "ref_bias": reference.bias}
