"""How many answers a second the client of servers takes on one core, and how much of an endpoint's time a rollout waits."""
