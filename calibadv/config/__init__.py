"""Configs: reading them, building a run from them, and errors in them."""
