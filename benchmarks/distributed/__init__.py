"""Whole training steps on several ranks: their time beside one process, their memory beside the plan."""
