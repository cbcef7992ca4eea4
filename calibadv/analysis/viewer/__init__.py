"""Viewer: one HTML page of rollouts, readable offline."""
