"""What scores a policy's samples: the prompt environment and the response environment; and the rewriter for inference.

May import `targets`, `engine`, `rewards`, `models`, `prompting`, `data`, `config` and `errors`.
"""
