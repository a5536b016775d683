"""The classes that Hydra must find here: the packed launcher, the grid sweeper and the Optuna sweeper."""
