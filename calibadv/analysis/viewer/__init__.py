"""A page of rollouts to read."""
