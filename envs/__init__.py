"""Gymnasium environments over the `Cluster` protocol, surrogate and real engine alike.

Importing this package registers `tidewright/Surrogate-v0`.
"""

from gymnasium.envs.registration import register

register(id="tidewright/Surrogate-v0", entry_point="envs.build:build_default_env")
