"""Runs in wandb, online or offline."""
