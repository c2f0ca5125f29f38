"""The engine's scheduler, plans and bookkeeping, run for real with models that compute nothing."""
