"""Indexes of a corpus: building, verifying and opening."""
