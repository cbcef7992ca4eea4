"""Encoders of text for dense retrieval and reranking."""
