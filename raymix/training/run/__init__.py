"""The run directory: files, lock, remote copy, checkpoints, metrics and progress."""
