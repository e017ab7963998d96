"""From tracked runs to figures: `load` and `evaluations` read MLflow, `cells` and `curves` aggregate, `plots` draws."""
