"""Generation only: the chain engine compared with transformers' methods, and on real models with vLLM and llama.cpp."""
