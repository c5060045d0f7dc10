"""Prune timm models while they train, on a Ray cluster, down to a budget that you name."""

__version__ = "0.1.0"
