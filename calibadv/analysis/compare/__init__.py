"""Compare runs: tables, charts and tests."""
