"""What a model, a task and a method offer: one base class each, and the data they hand on. Torch-free at import."""
