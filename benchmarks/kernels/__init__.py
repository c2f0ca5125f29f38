"""The head's operators, compared with the bare matrix products and with other implementations."""
