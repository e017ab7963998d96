"""From tracked runs to figures: `load` (MLflow to tables), `curves` (aggregates), `stats`, `plots`, `report`."""
