"""Two sweeps side by side, and what differs between them."""
