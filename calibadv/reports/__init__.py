"""Pages for people: runs compared, and rollouts to read."""
