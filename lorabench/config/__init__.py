"""Settings: their ranges and errors, what a run is, and what a model, a task and a method must offer."""
