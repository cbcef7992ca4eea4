"""The tags of messages, prompts, and token ids."""
