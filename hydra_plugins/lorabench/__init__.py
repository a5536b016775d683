"""Hydra plugins of lorabench: the packed launcher and the grid sweeper."""
