"""Indexes of a corpus: building, checking and opening them."""
