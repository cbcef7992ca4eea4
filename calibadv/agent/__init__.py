"""The search agent: its protocol, the multi-turn loop, and the way from rollouts to tensors."""
