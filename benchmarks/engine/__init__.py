"""Generation only: the chain engine compared with the generation methods of transformers."""
