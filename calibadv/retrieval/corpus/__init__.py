"""Corpora: documents in files, in memory and in Arrow tables."""
