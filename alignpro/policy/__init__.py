"""What is trained: the policy, its reference, the module that DeepSpeed shards, and fixed prefixes.

May import `distributed`, `models`, `config`, `errors` and `alignpro_kernels`.
"""
