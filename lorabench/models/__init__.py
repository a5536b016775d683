"""How a base is loaded: one file a family. Each file holds a frozen dataclass `Config` (see docs/architecture.md)."""
