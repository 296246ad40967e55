"""Quantization-aware training: a live torch model that computes with the weights, and the inputs of
its linear layers, that the quantized file will have.
"""
