"""Models of which each rank holds a part: how they are partitioned, and gathered to run."""
