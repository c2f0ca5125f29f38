"""GGUF, the file format of llama.cpp and Ollama: models read from it and written to it.

| file | subject |
|---|---|
| `header` | the metadata and the table of tensors, checked against the file's size; which quantizations can be read |
| `packaged` | models that come as a GGUF file in a Python package, and their checksums |
| `reading` | a file → model and tokenizer of transformers |
| `configuration` | what transformers' reader leaves out of a model's configuration |
| `vocabulary` | a tokenizer from a file's metadata, and as metadata |
| `writing` | model and tokenizer of transformers → a file |

`header` and `packaged` import neither torch nor transformers; the package `gguf` is optional and imported where it is used.
"""
