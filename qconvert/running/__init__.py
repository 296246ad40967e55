"""Running a model: Hugging Face checkpoints with torch, and the text that goes in.

torch and transformers are imported inside functions only: everything else works without them.
"""
