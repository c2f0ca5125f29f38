"""Several processes that train one policy: who they are, what they say to each other, and how weights are sharded."""
