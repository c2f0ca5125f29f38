"""The processes of a job: `Ranks`, their session and phases, and what the launcher has set.

`sharding` holds models of which each rank keeps a part, `deepspeed` the configuration and extensions of that library; the
backend that trains by it is in `training`. Nothing here knows what is trained. May import `models`, `config` and `errors`.
"""
