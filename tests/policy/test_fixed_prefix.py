"""Training an activated LoRA: tokens before its invocation are computed once, and have no backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import ARCHITECTURES, INVOCATION, gradients, logits_by_peft, ragged, tiny_adapted, tokenizer
from torch import Tensor

from alignpro.models import packed_attention
from alignpro.models.language_model import LanguageModel
from alignpro.models.sequences import SequenceBatch
from alignpro.policy import fixed_prefix
from alignpro.policy.fixed_prefix import policy_and_base_states, policy_states
from alignpro.policy.policy import Policy
from alignpro_kernels.varlen_reference import ReferenceKernels

K = 3
TOKENS = tokenizer("llama").encode(INVOCATION, add_special_tokens=False)
TEXTS = [[token + 5 for token in row] for row in ragged(3, 50, shortest=25, longest=40, seed=1)]
COMPLETIONS = [*ragged(2 * K, 50, longest=6, seed=2), [], [7], [8, 9]]


def batch(model: LanguageModel, *, before: Sequence[int] = (), length: int = 99) -> SequenceBatch:
    """Return K sequences per prompt; a prompt is a text, truncated to ``length`` tokens, and the invocation."""
    prompts = [[*before, *text[:length], *model.invocation] for text in TEXTS for _ in range(K)]
    return SequenceBatch.build(prompts, COMPLETIONS)


def by_peft(model: LanguageModel, sequences: SequenceBatch) -> Tensor:
    """Return log p of each action, (N,), by peft's own forward pass, row by row."""
    logp = logits_by_peft(model, sequences).log_softmax(-1)
    return logp.gather(1, sequences.targets[:, None]).squeeze(1)


def tokens_computed(model: LanguageModel) -> list[int]:
    """Return a list that records the number of tokens of each forward pass."""
    seen: list[int] = []
    layer = next(module for name, module in model.causal.named_modules() if name.endswith(".mlp"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_and_gradients_equal_those_of_peft_row_by_row(architecture: str, checkpointing: bool) -> None:
    policy = Policy(tiny_adapted(architecture, dtype=torch.float64), None)
    sequences = batch(policy.model)
    truth = by_peft(policy.model, sequences)
    summed = sequences.scatter(truth).sum(1)
    expected = gradients(policy.model, summed)
    with torch.no_grad(), policy.model.disable_adapter():
        reference = by_peft(policy.model, sequences)
    if checkpointing:
        policy.model.enable_gradient_checkpointing()
    computed = tokens_computed(policy.model)
    ours = policy.sequence_logprob(sequences)
    assert computed[0] == sum(map(len, TEXTS))  # the prefixes, in a pass of their own
    assert torch.allclose(ours, summed, atol=1e-4)  # rotary angles and norms are float32 in transformers
    for name, gradient in gradients(policy.model, ours).items():
        assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm(), name
    values = policy.token_stats(sequences)
    assert torch.allclose(values.logprob, sequences.scatter(truth.detach()), atol=1e-4)
    assert torch.allclose(values.reference_logprob, sequences.scatter(reference), atol=1e-4)
    assert (values.logprob - values.reference_logprob).abs().max() > 0.1


def test_prefixes_are_computed_once() -> None:
    model = tiny_adapted()
    computed, policy = tokens_computed(model), Policy(model, None)
    X, invocation = sum(map(len, TEXTS)), len(model.invocation)
    R = sum(max(0, len(completion) - 1) for completion in COMPLETIONS)
    own = K * len(TEXTS) * invocation + R
    policy.sequence_logprob(batch(model))
    assert computed == [X, own]
    computed.clear()
    policy.token_stats(batch(model))
    assert computed == [X, own, own]  # the policy and the reference
    computed.clear()
    # A common prefix of all prompts is computed once.
    template = ragged(1, 50, shortest=20, longest=20, seed=4)[0]
    policy.sequence_logprob(batch(model, before=template))
    assert computed == [20 + X, own]
    computed.clear()
    # If prefixes are short, computing the invocation per sequence would cost more than the prefixes.
    short = batch(model, length=3)
    policy.sequence_logprob(short)
    policy.token_stats(short)
    assert computed == 3 * [3 * (3 + invocation) + R]


def test_no_gradient_flows_through_the_prefix() -> None:
    model = tiny_adapted()
    made: list[bool] = []
    layer = next(module for name, module in model.causal.named_modules() if name.endswith(".mlp"))
    layer.register_forward_hook(lambda module, inputs, output: made.append(output.requires_grad))
    Policy(model, None).sequence_logprob(batch(model))
    assert made == [False, True]


def test_trained_weights_of_the_base_get_gradients() -> None:
    """The prefix is not fixed if weights of the base model are trained."""
    model = tiny_adapted(dtype=torch.float64).requires_grad_(True)
    policy = Policy(model, tiny_adapted(dtype=torch.float64))
    sequences = batch(model)
    expected = gradients(policy.model, sequences.scatter(by_peft(model, sequences)).sum(1))
    for name, gradient in gradients(policy.model, policy.sequence_logprob(sequences)).items():
        assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("prompts", "passes"),
    [
        ([[*TEXTS[0], *TOKENS]] * 3 + [[*TEXTS[1], *TOKENS, 5]] * 2, 3),
        ([[*TEXTS[0], *TOKENS]] * 3 + [[*TEXTS[0], *TOKENS, 5]] * 2, 3),  # one prefix
        ([[*TEXTS[0], *TOKENS]] * 3 + [TOKENS] * 2, 2),  # no prefix: sequences are packed with their prompts
    ],
)
def test_prompts_of_every_kind(prompts: list[list[int]], passes: int) -> None:
    model = tiny_adapted()
    sequences = SequenceBatch.build(prompts, [[5, 6, 7], [], [8], [9, 10], []])
    computed = tokens_computed(model)
    with torch.no_grad():
        acting, base = policy_and_base_states(model, sequences)
    assert len(computed) == passes
    assert acting.shape == base.shape == (6, 32)
    assert torch.allclose(acting, model.action_states(sequences), atol=1e-5)
    assert torch.allclose(base, model.without_adapter().action_states(sequences), atol=1e-5)
    assert torch.allclose(policy_states(model, sequences), acting, atol=1e-5)


@pytest.mark.parametrize("shared", [[], list(range(9, 21))])
def test_without_padding_states_and_gradients_are_the_same(shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the prefixes share a prefix of their own."""
    policy = Policy(tiny_adapted("llama", dtype=torch.float64), None)
    sequences = batch(policy.model, before=shared)
    padded = policy.sequence_logprob(sequences)
    expected = gradients(policy.model, padded)
    for module in (fixed_prefix, packed_attention):
        monkeypatch.setattr(module, "unpadded_kernels", lambda *_: ReferenceKernels())
    ours = policy.sequence_logprob(sequences)
    torch.testing.assert_close(ours, padded, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(policy.model, ours).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_kept_states_have_gradients_of_the_weights() -> None:
    policy = Policy(tiny_adapted(dtype=torch.float64), None)
    sequences = batch(policy.model)
    values = policy.token_stats(sequences, keep_states=True)
    assert values.states is not None and not values.reference_states.requires_grad
    truth = gradients(policy.model, policy.model.action_states(sequences))
    for name, gradient in gradients(policy.model, values.states).items():
        assert (gradient - truth[name]).norm() <= 2e-6 * truth[name].norm(), name
