"""A whole step of reinforcement learning, beside the recipes that users would otherwise write."""
