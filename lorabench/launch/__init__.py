"""Hydra's command line into jobs: composing, grids, Optuna, and what is refused before anything runs."""
