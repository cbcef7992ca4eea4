"""Run folders: files of rollouts, checkpoints, settings and results."""
