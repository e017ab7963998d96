"""Credit assignment: from the rewards of a rollout to one advantage a turn. One file a rule."""
