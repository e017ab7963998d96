"""Evaluation: any policy on any scenario, on frozen seeds that all policies share, kept as it is played."""
