"""A sweep read from tracking: its runs, curves, comparisons, tables and card."""
