"""Evaluation: the arms that are compared, statistics of nested rewards, the figure and the report.

May import everything but `demo`, `doctor` and `cli`.
"""
