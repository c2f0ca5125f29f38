"""Training: the loop, the run and its directory, checkpoints, metrics, and the torch and DeepSpeed backends.

May import everything but `evaluation`, `demo`, `doctor` and `cli`.
"""
