"""msgrpo_lab: post-train language models as agents on multi-step text games (arXiv 2508.10839)."""

__version__ = "0.1.0"
