"""What is raised about checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line that names the file and why."""
