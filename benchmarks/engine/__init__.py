"""Generation alone: the chain engine beside transformers' ways to generate."""
