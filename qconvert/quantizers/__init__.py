"""Arithmetic per family of encodings: affine, casts, ggml block types."""
