"""Models: a frozen base by its layers and its weights. One file a kind, found by its name."""
