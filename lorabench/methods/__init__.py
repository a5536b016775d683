"""Methods: what trains. One file each, holding a frozen dataclass `Config` with `pack_group` and `plan`."""
