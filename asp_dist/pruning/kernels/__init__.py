"""What runs on a GPU: all layers in one launch, and nothing that the host has to wait for."""
