"""Matrices as other tools lay them in safetensors files: several plain tensors to each.

`layout` says what such a layout is, `integers` has what those of integer codes share; there is a
module for each format, with its layouts and its codec. Their law is formats/exchange.
"""
