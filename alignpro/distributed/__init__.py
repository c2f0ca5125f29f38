"""Training one policy in several processes: starting and ending them, their communication, and sharded weights."""
