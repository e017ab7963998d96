"""A run's folder: its lock, checkpoints, the way to go on, and the jobs of a sweep."""
