"""The head's operators against the bare matrix products and against other implementations."""
