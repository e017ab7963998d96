"""Runs in MLflow or as CSV: opened, logged, closed, and delivered later where the store did not answer."""
