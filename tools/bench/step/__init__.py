"""Benchmarks of a training step and of sampling."""
