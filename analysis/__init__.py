"""From tracked runs to figures: `msgrpo_lab.report` and `evaluations` read MLflow, `plots` draws, `table` writes."""
