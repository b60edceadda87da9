"""SLO rates: what one replica takes of each type within its targets, as capacity in a plan.

They were measured at the centres of one typing. At other lengths a type is given the share of the
service rate that the targets leave of the nearest centre (in ln of the lengths): the rate at those
lengths is this share of the service rate at those lengths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.service_model import service_rates
from controller.workload import assign, centres
from engine.cluster import ParallelConfig, WorkloadType, WorkloadTyping
from engine.errors import InvalidRequestError
from engine.profile import ProfiledCluster

Floats = NDArray[np.float64]
MAKE = "python -m envs.slo_rates PROFILE"


def fingerprint(cluster: ProfiledCluster) -> str:
    """Of all that one replica's rates can depend on: not how large the pool is."""
    facts = cluster.to_json()
    spec = {k: v for k, v in facts["spec"].items() if k not in ("num_devices", "devices_per_node")}
    return _hash([spec, facts["profile"]])


def digest(made_from: str, typing: WorkloadTyping, targets: Mapping[str, Any]) -> str:
    """Of a fingerprint, the types and the targets, as configs/slo.yaml has them."""
    return _hash([made_from, asdict(typing), dict(targets)])


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class SloRates:
    """rates[class][C, J], requests per second that one replica of each of `configs` takes of each
    type within the class's targets; 0 where even a lone request misses them. `digest` is that of
    all that they follow from."""

    configs: tuple[ParallelConfig, ...]
    typing: WorkloadTyping
    rates: dict[str, Floats]
    digest: str

    def shares(
        self, cluster: ProfiledCluster, configs: Sequence[ParallelConfig], request_class: str
    ) -> Floats:
        """[C, J] of the service rate that the targets leave, for `configs` and the types here.

        Raises InvalidRequestError for a class or a configuration without rates.
        """
        if request_class not in self.rates or not set(configs) <= set(self.configs):
            raise InvalidRequestError(
                f"there are SLO rates for {', '.join(self.rates)} and the configurations "
                f"{', '.join(c.key for c in self.configs)}, not for {request_class!r} and "
                f"{', '.join(c.key for c in configs)}; name another class or run {MAKE}."
            )
        rows = [self.configs.index(c) for c in configs]
        sustained = service_rates(cluster, configs, centres(self.typing))
        return np.asarray(self.rates[request_class][rows] / sustained)

    def nearest(self, lengths: Floats) -> NDArray[np.int64]:
        """[J] which of the types here is nearest to mean lengths[J, 2]."""
        return assign(self.typing, lengths[:, 0], lengths[:, 1])

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "typing": asdict(self.typing),
            "configs": [[c.tp, c.pp] for c in self.configs],
            "rates": {name: found.tolist() for name, found in self.rates.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SloRates:
        """Raises InvalidRequestError when it is not what `to_json` writes."""
        try:
            types = tuple(WorkloadType(**t) for t in data["typing"]["types"])
            return cls(
                tuple(ParallelConfig(tp, pp) for tp, pp in data["configs"]),
                WorkloadTyping(types, tuple(data["typing"]["prior"])),
                {name: np.array(found) for name, found in data["rates"].items()},
                data["digest"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"these are no SLO rates ({error!r}); make them with {MAKE}."
            ) from error
