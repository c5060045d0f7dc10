"""Checkpoints: what they contain, where they are stored, and which ones are kept."""
