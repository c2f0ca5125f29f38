"""A whole step of reinforcement learning, compared with the recipes that users would otherwise write."""
