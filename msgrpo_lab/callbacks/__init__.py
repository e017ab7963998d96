"""What watches a run and writes down what it saw: tracking, provenance, progress bars, collapse warnings."""
