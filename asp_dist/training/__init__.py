"""The trainer: plain PyTorch that runs the same in one process, under torchrun and under Ray Train."""
