"""Scripts for people who work on calibadv: benchmarks, measures and checks that take too long for a test."""
