"""SLO rates: the highest rate of a type at which one replica alone still meets its targets.

That is DistServe's goodput (arXiv 2401.09670, section 3) of one replica, here by simulation on the
surrogate: Poisson arrivals, every request as long as the type's centre, bisection on the rate up to
the rate that the replica sustains at all. All rates of a type are tried with the same exponential
draws (common random numbers), so that looser targets never give a lower rate.

`python -m envs.slo_rates configs/profiles/NAME.json ...` writes configs/slo_rates/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controller.build import SLO_RATES, load_profiled_cluster
from controller.service_model import feasible_configs, service_rates
from controller.slo import CLASSES, DEFAULT_SLO, SloConfig, read_slo
from controller.slo_rates import SloRates, digest, fingerprint
from controller.workload import centres, fit_typing
from engine.cluster import ParallelConfig, SloSpec, WorkloadTyping, dense_deployment
from engine.errors import TidewrightError
from engine.profile import ProfiledCluster
from envs.reward import slo_met
from envs.surrogate.cluster import SurrogateCluster
from envs.workload import WorkloadConfig, generate
from policies.base import TrafficColumns

Floats = NDArray[np.float64]
WARM_UP, COUNTED = 500, 2000  # requests of a simulated run
BISECTIONS = 10  # to a thousandth of the sustained rate
NUM_TYPES = 4
SAMPLE_S = 3600.0  # of generated traffic that the default typing is fitted to
LONG_S = 1e7  # after the last arrival: by then all have ended


# --------------------------------------------------------------------------------------
# One replica


class LoneReplica:
    """One replica that serves one type at chosen rates; every rate is simulated once."""

    def __init__(
        self, cluster: ProfiledCluster, parallel: ParallelConfig, lengths: Floats, seed: int
    ) -> None:
        self.cluster, self.parallel = cluster, parallel
        self.most = float(service_rates(cluster, [parallel], lengths[None])[0, 0])
        number = WARM_UP + COUNTED
        self._gaps = np.random.default_rng(seed).exponential(1.0, number)
        self._prompt, self._output = (
            np.full(number, round(max(n, 1.0)), np.int64) for n in lengths.tolist()
        )
        self._known: dict[float, TrafficColumns] = {}

    def serve(self, rate_per_s: float) -> TrafficColumns:
        """What became of the requests; all have ended."""
        if rate_per_s not in self._known:
            replica = dense_deployment([self.parallel])
            surrogate = SurrogateCluster(self.cluster, replica, columns=True)
            arrival_s = np.cumsum(self._gaps) / rate_per_s
            surrogate.submit_columns(arrival_s, self._prompt, self._output)
            surrogate.advance(arrival_s[-1] + LONG_S)
            self._known[rate_per_s] = surrogate.take_columns()
        return self._known[rate_per_s]

    def attainment(self, rate_per_s: float, slo: SloSpec) -> float:
        """Share of the requests after the warm-up that meet both targets."""
        ended = self.serve(rate_per_s)
        return float(slo_met(slo, ended)[ended.index >= WARM_UP].sum() / COUNTED)

    def highest_rate(self, slo: SloSpec, attainment: float) -> float:
        """Requests per second; 0 where no rate that was tried meets the targets."""
        if self.attainment(self.most, slo) >= attainment:
            return self.most
        low, high = 0.0, self.most
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.attainment(middle, slo) >= attainment:
                low = middle
            else:
                high = middle
        return low


# --------------------------------------------------------------------------------------
# All replicas of a profile


def default_typing(cluster: ProfiledCluster, num_types: int = NUM_TYPES) -> WorkloadTyping:
    """Fitted to the embedded generator, its lengths scaled to the model's context."""
    context, config = cluster.spec.model.max_model_len, WorkloadConfig()
    sample = generate(config, SAMPLE_S, np.random.default_rng(0))
    sample = sample.scale_lengths(min(1.0, context / config.max_tokens), context)
    return fit_typing(sample.prompt_tokens, sample.output_tokens, num_types, seed=0)


def slo_rates(
    cluster: ProfiledCluster, typing: WorkloadTyping, slo: SloConfig, seed: int = 0
) -> SloRates:
    """Of every configuration that fits, rounded to four digits."""
    configs, lengths = feasible_configs(cluster), centres(typing)
    specs = {name: slo.spec(cluster.profile.device, name) for name in CLASSES}
    found = {name: np.zeros((len(configs), len(lengths))) for name in CLASSES}
    for c, parallel in enumerate(configs):
        for j, of_type in enumerate(lengths):
            replica = LoneReplica(cluster, parallel, of_type, seed)
            for name, spec in specs.items():
                rate_per_s = replica.highest_rate(spec, slo.attainment)
                found[name][c, j] = float(f"{rate_per_s:.4g}")
    made = digest(fingerprint(cluster), typing, slo.targets)
    return SloRates(configs, typing, found, made)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m envs.slo_rates", description="Make SLO rates.")
    parser.add_argument("profiles", type=Path, nargs="+", help="measured cluster JSON")
    parser.add_argument("--slo", type=Path, default=DEFAULT_SLO, help="targets")
    parser.add_argument("--out", type=Path, default=SLO_RATES, help="folder")
    args = parser.parse_args(argv)
    try:
        slo = read_slo(args.slo)
        args.out.mkdir(parents=True, exist_ok=True)
        for path in args.profiles:
            cluster = load_profiled_cluster(path)
            found = slo_rates(cluster, default_typing(cluster), slo)
            (args.out / path.name).write_text(json.dumps(found.to_json(), indent=1) + "\n")
            print(f"{args.out / path.name}: {len(found.configs)} configurations")
    except TidewrightError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
