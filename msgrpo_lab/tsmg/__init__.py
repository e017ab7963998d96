"""The games: text-mediated stochastic games, and nothing about language models."""
