"""Streaming parallel decoding: the passes through the model, and the cache that they share."""
