"""Exact values where a game is small enough to know them, reference players where it is not."""
