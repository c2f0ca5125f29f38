"""What a run would do and need: the dry run, and memory by formula.

Reads `config`, `distributed` and `models`; nothing is loaded. The command line and `training` read it.
"""
