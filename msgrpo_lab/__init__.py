"""msgrpo_lab: post-train language models as agents on multi-step text games (arXiv 2508.10839)."""

import os

__version__ = "0.1.0"

# MKL may cut one float32 product differently from call to call, by how many threads it grants it: the last bits then
# change from run to run. It is to take all threads it is given, and to add up in one order. Read at MKL's first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("MKL_DYNAMIC", "FALSE")
