"""Models of which each rank holds a part, and which are gathered whole to run: frozen ones, and the policy for sampling.

May import what `alignpro.distributed` may.
"""
