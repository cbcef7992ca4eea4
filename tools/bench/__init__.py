"""Benchmarks, each a module that prints its tables: run them from the root of the repository with ``python -m``."""
