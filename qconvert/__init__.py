"""qconvert: convert model weights to quantized files, and prove the result."""

__version__ = "0.1.0"
