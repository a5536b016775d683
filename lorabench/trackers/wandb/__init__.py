"""Weights & Biases, mirrored by a process of its own."""

from lorabench.trackers.wandb.tracker import build as build
