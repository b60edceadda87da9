"""Gymnasium environments over the `Cluster` protocol, surrogate and real engine alike.

Importing this package registers `tidewright/Surrogate-v0` and `tidewright/Engine-v0`.
"""

from gymnasium.envs.registration import register

register(
    id="tidewright/Surrogate-v0",
    entry_point="envs.registered:make_surrogate",
    vector_entry_point="envs.registered:make_surrogate_vector",
)
register(
    id="tidewright/Engine-v0",
    entry_point="envs.registered:make_engine",
    nondeterministic=True,  # time is real
)
