"""The headroom study: how much unequal replicas and switching can win, where, and who takes it."""
