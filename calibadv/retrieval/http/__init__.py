"""Retrieval over HTTP: server, request batching, message format, and a client with deadlines."""
