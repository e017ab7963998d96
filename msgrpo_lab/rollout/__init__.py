"""Rollouts: the loop that plays episodes with an engine, and what it says of them."""
