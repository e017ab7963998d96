"""Checkpoints: the format on disk, a run's state taken and put back, and which checkpoint to take."""
