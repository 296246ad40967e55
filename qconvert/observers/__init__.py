"""Streams of values to statistics and ranges."""
