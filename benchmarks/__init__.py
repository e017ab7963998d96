"""Measurements of speed: `throughput.py` within the lab, `peers.py` against other trainers. See docs/benchmarks.md."""
