"""The one run on a GPU: smoke checks, tests and benchmarks with time limits, kept in one archive; `.ci/gpu` starts it."""
