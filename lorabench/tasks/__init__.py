"""Tasks: one file each, holding a frozen dataclass `Config` (see docs/architecture.md, "The task contract")."""
