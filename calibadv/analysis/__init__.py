"""Analysis of finished runs and of data: comparison, viewer, replay and coverage audit."""
