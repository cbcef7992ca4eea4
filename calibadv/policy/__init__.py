"""The model in training, its reference, and log-probabilities."""
