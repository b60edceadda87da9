"""ControlService over gRPC: check, call, convert back; no logic.

What may wait for a tick or for the engine, or takes long, runs off the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import grpc

from controller import replies
from controller.deadlines import DeadlineInterceptor
from controller.explanations import explain
from controller.gate_interceptor import GateInterceptor
from controller.loop import ControlLoop
from controller.operations import Operations, Proposal
from controller.records import TickRecord
from controller.replies import MODES, NUMBERS
from controller.security import Security
from controller.sessions import Sessions
from controller.tick_records import Explained
from engine.cluster import ClusterEvent, ClusterSnapshot
from engine.errors import InvalidRequestError, NotFoundError
from engine.grpc_server import start_server
from engine.wire import from_proto, to_proto
from protos import control_pb2, control_pb2_grpc

SERVICE_NAME = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
T = TypeVar("T", bound=Any)


class Bell:
    """Wakes all who wait on the event loop that made it; rung from any thread."""

    def __init__(self) -> None:
        self._loop, self.next = asyncio.get_running_loop(), asyncio.Event()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        rung, self.next = self.next, asyncio.Event()
        rung.set()


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """The servicer over one loop."""

    def __init__(self, loop: ControlLoop, operations: Operations, sessions: Sessions) -> None:
        self._loop, self._operations, self._sessions = loop, operations, sessions
        self._started_s, self._bell = time.monotonic(), Bell()
        loop.listeners.append(self._bell.ring)

    async def _once(self, kind: type[T], request: Any, run: Callable[[], T]) -> T:
        """The answer that `run` makes off the event loop, once per idempotency key."""
        method = request.DESCRIPTOR.name.removesuffix("Request")
        asked = method.encode() + request.SerializeToString(deterministic=True)
        once = self._operations.idempotency.once
        answer = await asyncio.to_thread(
            once, request.idempotency_key, asked, lambda: run().SerializeToString()
        )
        found: T = kind.FromString(answer)
        return found

    # ---------------------------------------------------------------- watching

    async def GetState(self, request: Any, context: Any) -> Any:
        return self._state()[0]

    def _state(self) -> tuple[Any, int]:
        with self._loop.lock:
            uptime_s = time.monotonic() - self._started_s
            return replies.state(self._loop, uptime_s), self._loop.revision

    async def WatchState(self, request: Any, context: Any) -> AsyncIterator[Any]:
        seen = self._resumed(request.resume_token)
        while True:
            rung = self._bell.next
            state, revision = self._state()
            if revision != seen:
                token = self._token(revision)
                yield control_pb2.WatchStateResponse(state=state, resume_token=token)
                seen = revision
            await rung.wait()

    def _token(self, number: int) -> str:
        return f"{self._loop.lineage}:{number}"

    def _resumed(self, token: str) -> int | None:
        """The number in a token of this life, or of one that it goes on from; None without one."""
        if not token:
            return None
        lineage, _, number = token.rpartition(":")
        if lineage != self._loop.lineage or not number.isdecimal():
            raise InvalidRequestError(
                f"resume token {token!r} is not of this controller, or it was started anew since; "
                "watch without a token.",
                "resume_token",
            )
        return int(number)

    async def WatchDecisions(self, request: Any, context: Any) -> AsyncIterator[Any]:
        with self._loop.lock:
            last = self._loop.next_seq - 1
        resumed = self._resumed(request.resume_token)
        wanted = request.from_seq or last + 1 if resumed is None else resumed + 1
        if not 0 < wanted <= last + 1:
            raise InvalidRequestError(
                f"from_seq is {wanted}, the next tick of this controller is {last + 1}; it was "
                "started again since: watch from 1, or from 0 for ticks to come.",
                "from_seq",
            )
        while True:
            rung = self._bell.next
            for record in self._since(wanted):
                response = control_pb2.WatchDecisionsResponse(
                    num_lost=record.seq - wanted, resume_token=self._token(record.seq)
                )
                to_proto(record, response.record)
                yield response
                wanted = record.seq + 1
            await rung.wait()

    def _since(self, seq: int) -> list[TickRecord]:
        with self._loop.lock:
            newest = itertools.takewhile(lambda r: r.seq >= seq, reversed(self._loop.records))
            return list(newest)[::-1]

    async def Explain(self, request: Any, context: Any) -> Any:
        found = self._explained(request.seq, request.decision_id)
        spec = self._loop.pipeline.observation_spec
        reply = replies.explanation(
            explain(found.record, found.observation, spec), request.candidate_key
        )
        if request.candidate_key and not reply.candidates:
            known = ", ".join(c.key for c in found.record.candidates)
            raise NotFoundError(
                f"{request.candidate_key!r} was no candidate at tick {found.record.seq}; those "
                f"were {known}."
            )
        return reply

    def _explained(self, seq: int, decision_id: str) -> Explained:
        with self._loop.lock:
            known = list(self._loop.explained)
        found = [
            e
            for e in known
            if seq in (0, e.record.seq) and decision_id in ("", e.record.decision_id)
        ]
        if not found:
            span = f"{known[0].record.seq} to {known[-1].record.seq}" if known else "none yet"
            wanted = decision_id or seq or "any"
            raise NotFoundError(f"tick {wanted} cannot be explained; those kept are {span}.")
        return found[-1]

    # ---------------------------------------------------------------- switches

    async def ProposeSwitch(self, request: Any, context: Any) -> Any:
        def run() -> Any:
            return replies.proposal(self._propose(request.target_key, request.dry_run, None))

        return await self._once(control_pb2.ProposeSwitchResponse, request, run)

    def _propose(self, target_key: str, dry_run: bool, epoch: int | None) -> Proposal:
        if not target_key:
            raise InvalidRequestError(
                "target_key is empty; give a deployment such as '2xtp2pp1'.", "target_key"
            )
        return self._operations.propose(target_key, dry_run, epoch)

    async def ApplySwitch(self, request: Any, context: Any) -> Any:
        _require_key(request)
        if not request.HasField("expected_epoch"):
            raise InvalidRequestError(
                "expected_epoch is not given; take the epoch that GetState tells, so that the "
                "switch is from the deployment you saw.",
                "expected_epoch",
            )

        def run() -> Any:
            found = self._propose(request.target_key, False, request.expected_epoch)
            response = control_pb2.ApplySwitchResponse(
                applied=found.ticket is not None,
                vetoes=found.vetoes,
                target_key=found.decision.chosen_key,
                decision_id=found.decision.decision_id,
            )
            if found.ticket is not None:
                to_proto(found.ticket, response.ticket)
            return response

        return await self._once(control_pb2.ApplySwitchResponse, request, run)

    async def CancelSwitch(self, request: Any, context: Any) -> Any:
        _require_key(request)

        def run() -> Any:
            response = control_pb2.CancelSwitchResponse()
            to_proto(self._operations.cancel(request.ticket_id), response.ticket)
            return response

        return await self._once(control_pb2.CancelSwitchResponse, request, run)

    # ---------------------------------------------------------------- what the loop may do

    async def Hold(self, request: Any, context: Any) -> Any:
        def run() -> Any:
            held = self._operations.hold(request.duration_s, request.reason)
            return control_pb2.HoldResponse(hold=replies.hold(held, self._loop.clock()))

        return await self._once(control_pb2.HoldResponse, request, run)

    async def Resume(self, request: Any, context: Any) -> Any:
        def run() -> Any:
            ended, at_s = self._operations.resume(), self._loop.clock()
            return control_pb2.ResumeResponse(ended=[replies.hold(h, at_s) for h in ended])

        return await self._once(control_pb2.ResumeResponse, request, run)

    async def SetMode(self, request: Any, context: Any) -> Any:
        if request.mode not in MODES:
            raise InvalidRequestError(
                f"mode is {request.mode}; expected MODE_ACTIVE, MODE_ADVISORY or MODE_OFF.", "mode"
            )

        def run() -> Any:
            previous = self._operations.set_mode(MODES[request.mode])
            return control_pb2.SetModeResponse(mode=request.mode, previous=NUMBERS[previous])

        return await self._once(control_pb2.SetModeResponse, request, run)

    # ---------------------------------------------------------------- what if

    async def GetForecast(self, request: Any, context: Any) -> Any:
        at_s, found = await asyncio.to_thread(self._operations.forecasts)
        pipeline = self._loop.pipeline
        return control_pb2.GetForecastResponse(
            at_s=at_s,
            grid_s=pipeline.config.grid_s,
            predictor=pipeline.predictor.name,
            horizons=[replies.forecast(f, pipeline.typing.types) for f in found],
        )

    async def GetPlan(self, request: Any, context: Any) -> Any:
        demand = {d.type: d.rate_per_s for d in request.demand}
        found = await asyncio.to_thread(self._operations.plan, demand)
        return control_pb2.GetPlanResponse(
            deployment_key=found[0].key, deployments=[replies.estimate(c) for c in found]
        )

    # ---------------------------------------------------------------- policies

    async def ListPolicies(self, request: Any, context: Any) -> Any:
        infos = await asyncio.to_thread(self._operations.roster.infos)
        return control_pb2.ListPoliciesResponse(policies=[self._policy(i) for i in infos])

    def _policy(self, info: Any) -> Any:
        return replies.policy(info, self._loop.active)

    async def LoadPolicy(self, request: Any, context: Any) -> Any:
        def run() -> Any:
            now, before = map(self._policy, self._operations.load_policy(request.name))
            return control_pb2.LoadPolicyResponse(policy=now, previous=before)

        return await self._once(control_pb2.LoadPolicyResponse, request, run)

    async def Rollback(self, request: Any, context: Any) -> Any:
        def run() -> Any:
            now, before = map(self._policy, self._operations.rollback())
            return control_pb2.RollbackResponse(policy=now, previous=before)

        return await self._once(control_pb2.RollbackResponse, request, run)

    async def SetCanary(self, request: Any, context: Any) -> Any:
        def run() -> Any:
            self._operations.set_canary(request.name, request.fraction)
            found = self._loop.trials.canary
            canary = None if found is None else replies.canary(found)
            return control_pb2.SetCanaryResponse(canary=canary)

        return await self._once(control_pb2.SetCanaryResponse, request, run)

    # ---------------------------------------------------------------- other engines

    async def Decide(self, request: Any, context: Any) -> Any:
        if not request.HasField("snapshot"):
            raise InvalidRequestError("snapshot is missing; it must be given.", "snapshot")
        snapshot = from_proto(ClusterSnapshot, request.snapshot)
        events = tuple(from_proto(ClusterEvent, e) for e in request.events)
        sessions, name, policy = self._sessions, request.session, self._loop.policy_server.policy
        seed = request.seed if request.HasField("seed") else None
        arguments = (name, policy, snapshot, events, request.num_events_lost, seed)
        if sessions.is_brief(name, policy, snapshot, len(events)):
            found, routing = sessions.decide(*arguments)
        else:
            found, routing = await asyncio.get_running_loop().run_in_executor(
                sessions.worker, partial(sessions.decide, *arguments)
            )
        return replies.decided(found, routing, self._loop.pipeline.typing.types)

    async def ReportMetrics(self, request: Any, context: Any) -> Any:
        policy = self._loop.policy_server.policy

        def run() -> int:
            events = [from_proto(ClusterEvent, e) for e in request.events]
            return self._sessions.report(request.session, policy, events, request.num_events_lost)

        number = await asyncio.to_thread(run)
        return control_pb2.ReportMetricsResponse(num_events=number)


def _require_key(request: Any) -> None:
    if not request.idempotency_key:
        raise InvalidRequestError(
            "idempotency_key is empty; give one of your own, such as a UUID, so that the call can "
            "be repeated when its answer is lost.",
            "idempotency_key",
        )


async def start_grpc(
    loop: ControlLoop,
    operations: Operations,
    sessions: Sessions,
    host: str,
    port: int,
    security: Security | None = None,
) -> tuple[grpc.aio.Server, int]:
    """Start the service; returns the server and its port. Raises UnavailableError: port in use."""
    security = security or Security()
    servicer = ControlService(loop, operations, sessions)

    def add(server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)

    limit, credentials = security.max_message_bytes, security.credentials
    gate = GateInterceptor(security.gate, secure=credentials is not None)
    interceptors = [gate, DeadlineInterceptor(SERVICE_NAME)]
    return await start_server(add, SERVICE_NAME, host, port, interceptors, credentials, limit)
