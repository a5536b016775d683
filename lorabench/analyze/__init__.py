"""Command: what a sweep's runs did to the weights of their bases, measured from what they saved."""
