"""Rollouts: engines that complete prompts, and the loop that plays episodes with them."""
