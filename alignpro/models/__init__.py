"""A transformers model as this project runs it: loading, output head, adapters, packed sequences and their attention.

`language_model` splits a model into decoder and head; `admission` refuses what it would compute wrongly. What replaces
modules on a CPU is in `cpu`. May import `prompting`, `data`, `config`, `errors` and `alignpro_kernels`.
"""
