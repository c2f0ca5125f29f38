"""Whole training steps on several ranks: time compared with a single process, memory compared with the plan."""
