"""Corpora: documents in JSON-lines files, in memory and in Arrow files."""
