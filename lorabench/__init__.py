"""lorabench: which LoRA rank, alpha, modules and learning rate, answered with evidence."""

__version__ = "0.1.0"
