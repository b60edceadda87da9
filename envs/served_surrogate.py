"""ServedSurrogate: the surrogate behind the engine's own gRPC service, on the wall clock.

What a controller process can be run against where no engine is needed: benchmarks of the control
service, the soak test, tests of failover. It answers no prompts; its traffic is drawn here.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar, cast

import numpy as np

from controller.service_model import kv_cost_params
from engine.cluster import (
    ClusterSnapshot,
    ClusterSpec,
    EventBatch,
    KvCostParams,
    ParallelConfig,
    Request,
    Routing,
    SwitchPlan,
    SwitchTicket,
    dense_deployment,
    parse_deployment_key,
)
from engine.errors import InvalidRequestError
from engine.migration.plan import plan_switch
from engine.profile import ProfiledCluster
from engine.runtime import EngineRuntime
from engine.server import start_grpc
from engine.tokenizer import Tokenizer
from engine.tokens import TokenFile, TokenInterceptor
from envs.surrogate.cluster import SurrogateCluster

T = TypeVar("T")
CALL_TIMEOUT_S = 30.0
WATCH_POLL_S = 0.05
LENGTHS = ((64.0, 48.0), (700.0, 160.0))  # mean prompt and output tokens of the two kinds


class SurrogateRuntime:
    """Of one life of the engine: what `EngineService` asks of a runtime. On the event loop."""

    profile_json: dict[str, Any]

    def __init__(
        self, cluster: ProfiledCluster, key: str, rate_per_s: float, seed: int, regime_s: float
    ) -> None:
        self.profiled, self._rate_per_s, self._regime_s = cluster, rate_per_s, regime_s
        self.surrogate = SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)))
        self.profile_json = cluster.profile.to_json()
        self._rng, self._next_s = np.random.default_rng(seed), 0.0
        self._started_s, self.num_sent = time.monotonic(), 0

    @property
    def spec(self) -> ClusterSpec:
        return self.profiled.spec

    def at_present(self) -> SurrogateCluster:
        """Simulated up to now, with the traffic until now."""
        now_s = time.monotonic() - self._started_s
        while self._next_s < now_s:
            self.surrogate.submit(self._request(self._next_s))
            self._next_s += float(self._rng.exponential(1.0 / self._rate_per_s))
        self.surrogate.advance(now_s)
        return self.surrogate

    def _request(self, at_s: float) -> Request:
        """Mostly short ones in one regime, mostly long ones in the next."""
        favoured = int(at_s // self._regime_s) % 2
        kind = favoured if self._rng.random() < 0.85 else 1 - favoured
        prompt, output = (1 + int(self._rng.exponential(mean)) for mean in LENGTHS[kind])
        self.num_sent += 1
        longest = self.spec.model.max_model_len // 2
        return Request(f"r{self.num_sent}", at_s, min(prompt, longest), min(output, longest - 1))

    # ---------------------------------------------------------------- what the service asks

    def snapshot(self) -> ClusterSnapshot:
        return self.at_present().snapshot()

    def events(self, cursor: int) -> EventBatch:
        return self.at_present().events(cursor)

    async def wait_for_events(self, cursor: int, timeout_s: float) -> EventBatch:
        await asyncio.sleep(min(timeout_s, WATCH_POLL_S))
        return self.events(cursor)

    def check(self, plan: SwitchPlan) -> None:
        """A dry run is not carried out; nothing is checked."""

    def plan(self, target: Sequence[ParallelConfig], kv: KvCostParams | None = None) -> SwitchPlan:
        snapshot, costs = self.snapshot(), kv or kv_cost_params(self.profiled, target)
        return plan_switch(self.spec, snapshot.deployment, snapshot.epoch, target, costs)

    def apply(self, plan: SwitchPlan) -> SwitchTicket:
        return self.at_present().apply(plan)

    def ticket(self, ticket_id: str) -> SwitchTicket:
        return self.at_present().ticket(ticket_id)

    async def watch_ticket(self, ticket_id: str) -> AsyncIterator[SwitchTicket]:
        while True:
            ticket = self.ticket(ticket_id)
            yield ticket
            if ticket.phase.is_terminal:
                return
            await asyncio.sleep(WATCH_POLL_S)

    def cancel(self, ticket_id: str) -> SwitchTicket:
        return self.at_present().cancel(ticket_id)

    def set_routing(self, routing: Routing) -> None:
        self.at_present().set_routing(routing)


class _NoPrompts:
    def encode(self, text: str) -> list[int]:
        raise InvalidRequestError("a surrogate answers no prompts; it draws its own traffic.")


def _compile(cluster: ProfiledCluster, key: str) -> None:
    """The kernels, before anybody waits for an answer: it may take a minute, once."""
    surrogate = SurrogateCluster(cluster, dense_deployment(parse_deployment_key(key)))
    surrogate.submit(Request("first", 0.0, 8, 4))
    surrogate.advance(5.0)


class ServedSurrogate:
    """The service in a thread; `stop` it and `start` it again at the same port. Close it."""

    def __init__(
        self,
        cluster: ProfiledCluster,
        key: str,
        rate_per_s: float = 10.0,
        seed: int = 0,
        regime_s: float = 60.0,
        control_tokens: TokenFile | None = None,
    ) -> None:
        self._guards = () if control_tokens is None else (TokenInterceptor(control_tokens),)
        self.cluster, self.key, self.rate_per_s = cluster, key, rate_per_s
        self.seed, self.regime_s = seed, regime_s
        self.port, self.num_lives = 0, 0
        _compile(cluster, key)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, daemon=True)
        self._thread.start()
        self.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the engine's event loop, where alone the runtime may be asked."""
        return asyncio.run_coroutine_threadsafe(work, self._events).result(CALL_TIMEOUT_S)

    def build_runtime(self) -> SurrogateRuntime:
        seed = self.seed + self.num_lives
        return SurrogateRuntime(self.cluster, self.key, self.rate_per_s, seed, self.regime_s)

    def start(self) -> None:
        """A new life: deployment, clock and counters start over."""
        self.runtime = self.build_runtime()
        self.num_lives += 1
        served, prompts = cast(EngineRuntime, self.runtime), cast(Tokenizer, _NoPrompts())
        self._server, self.port = self.run(
            start_grpc(
                *(served, prompts, "surrogate", "127.0.0.1", self.port),
                interceptors=self._guards,
            )
        )

    def stop(self) -> None:
        self.run(self._server.stop(0))

    def snapshot(self) -> ClusterSnapshot:
        async def ask() -> ClusterSnapshot:
            return self.runtime.snapshot()

        return self.run(ask())

    def close(self) -> None:
        self.stop()
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._events.close()

    def __enter__(self) -> ServedSurrogate:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
