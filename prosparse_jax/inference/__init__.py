"""Decoding: a key/value cache, one compiled step per token, sampling."""
