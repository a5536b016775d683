"""Packs as jobs of a cluster: `job` is what runs there, `engines` where it is submitted, `crew` who waits for it."""
