"""Reports over finished runs: comparison, viewer, replay and audit."""
