"""Stacked adapters: K slices beside one frozen base."""

from lorabench.adapters.acting import IdleAdapters, check_adapters_act
from lorabench.adapters.context import Context, SlicesMix
from lorabench.adapters.inject import inject
from lorabench.adapters.isolation import check_slices_independent
from lorabench.adapters.stack import Stack, Trainable

__all__ = [
    "Context",
    "IdleAdapters",
    "SlicesMix",
    "Stack",
    "Trainable",
    "check_adapters_act",
    "check_slices_independent",
    "inject",
]
