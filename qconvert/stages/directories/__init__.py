"""Writing directories that other tools load: `target` has what all share, and there is a module for
each format, with its rules and its quantization block.
"""
