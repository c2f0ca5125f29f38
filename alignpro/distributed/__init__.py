"""The processes of a job: ranks and their session, the launcher, sharded models, DeepSpeed's configuration.

May import `models`, `config` and `errors`; nothing here knows what is trained.
"""
