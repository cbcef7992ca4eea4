"""What a healthy run looks like, and noticing when one no longer does; the CollapseGuard callback acts on it."""
