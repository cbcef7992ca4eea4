"""One rollout step: from sampled rollouts to optimizer steps."""
