"""DeepSpeed's configuration of a job, and the compilation of its extensions before ranks wait for each other.

May import what `alignpro.distributed` may; DeepSpeed itself is optional and imported where it is used.
"""
