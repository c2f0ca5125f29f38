"""The embedded demo: a small world in which the wording of a prompt determines how well a frozen target performs.

May import everything but `doctor` and `cli`.
"""
