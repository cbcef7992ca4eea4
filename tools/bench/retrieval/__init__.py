"""Benchmarks of indexes, retrievers and the retrieval server."""
