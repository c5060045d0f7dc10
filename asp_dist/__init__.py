"""Prune timm models while they train, on a Ray cluster, to a budget you choose."""

__version__ = "0.1.0"
