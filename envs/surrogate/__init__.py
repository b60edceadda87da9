"""The surrogate: an iteration-level simulator of the engine."""
