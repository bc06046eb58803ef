"""The training loop, checkpoints, writers and shared flags."""
