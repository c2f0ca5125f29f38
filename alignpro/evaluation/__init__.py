"""Evaluation: statistics of nested rewards, the figure and the report."""
