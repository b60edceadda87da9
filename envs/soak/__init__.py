"""The soak test: hours of control with a fault every so often, and what must hold at every tick."""
