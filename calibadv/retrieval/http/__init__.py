"""The retrieval service: server, batching and the format of messages."""
