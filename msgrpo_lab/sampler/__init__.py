"""Episode sampling: which episodes of a rollout are trained on. One file a method."""
