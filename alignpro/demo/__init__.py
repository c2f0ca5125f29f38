"""The embedded default: a small world in which the wording of a prompt decides how well a frozen target does."""
