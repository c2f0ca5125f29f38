"""A transformers model as this project runs it: loading, output head, adapters, packed sequences and their attention.

| file | subject |
|---|---|
| `loading`, `saving`, `merging` | a model in files: devices and dtypes, adapters with their base model |
| `adapters`, `token_lora`, `invocation` | which weights are trained; a LoRA that acts on a subset of the tokens, and on which |
| `peft_types` | whether a model is one of peft, without importing it |
| `language_model`, `head` | a model as decoder (tokens → hidden states) and head (hidden states → logits) |
| `admission`, `thresholds` | refuses what the project would compute wrongly, below and beyond every length in the configuration |
| `sequences` | batches of prompts and completions, and their packing into one row |
| `attention_interface`, `packed_attention`, `paged_attention` | attention in unmodified models, and its two backends |
| `packed_parts`, `packed_choice` | packed attention as variable-length calls, and which library computes them on a GPU |
| `gguf` | models from and to the file format of llama.cpp |
| `frozen_layers` | models that transformers' own passes run on a CPU |
| `garbage_collection` | pauses Python's garbage collector while much is made and kept |
| `cpu` | everything that replaces modules on a CPU |

May import `prompting`, `data`, `config`, `errors` and `alignpro_kernels`.
"""
