"""What is trained: the policy and its reference.

| file | subject |
|---|---|
| `policy` | the trained model, its reference, and the passes over both |
| `reference` | which model the reference is, and the fingerprint of its weights |
| `reference_logprobs` | log-probabilities under policy and reference, KL and entropy, from hidden states |
| `fixed_prefix` | passes that compute the tokens before an activated LoRA's invocation once |
| `zero3_module` | both models as one module, which DeepSpeed shards |

May import `distributed`, `models`, `config`, `errors` and `alignpro_kernels`.
"""
