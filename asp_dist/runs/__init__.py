"""A run's folder after the run: its model, evaluated again."""
