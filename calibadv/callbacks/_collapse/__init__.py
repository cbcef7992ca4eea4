"""Detecting a collapse from training curves."""
