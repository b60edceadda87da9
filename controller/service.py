"""ControlService over gRPC: check, call the loop, convert back; no logic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from controller.loop import ControlLoop
from controller.operations import Operations
from controller.records import Mode, TickRecord
from engine.errors import InvalidRequestError
from engine.grpc_server import start_server
from engine.wire import to_proto
from protos import control_pb2, control_pb2_grpc

SERVICE_NAME = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
WATCH_POLL_S = 0.2
MODES = {
    control_pb2.MODE_ACTIVE: Mode.ACTIVE,
    control_pb2.MODE_ADVISORY: Mode.ADVISORY,
    control_pb2.MODE_OFF: Mode.OFF,
}
NUMBERS = {mode: number for number, mode in MODES.items()}


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """The servicer over one loop. What may wait for a tick runs off the event loop."""

    def __init__(self, loop: ControlLoop) -> None:
        self._loop, self._started_s = loop, time.monotonic()
        self._operations = Operations(loop)

    async def GetState(self, request: Any, context: Any) -> Any:
        return self._state()

    def _state(self) -> Any:
        loop = self._loop
        with loop.lock:
            snapshot = loop.snapshot
            response = control_pb2.GetStateResponse(
                mode=NUMBERS[loop.mode],
                policy=loop.policy_server.policy.name,
                uptime_s=time.monotonic() - self._started_s,
                grid_s=loop.pipeline.config.grid_s,
                engine_available=loop.available,
                next_seq=loop.records[-1].seq + 1 if loop.records else 1,
            )
            to_proto(loop.counters, response.counters)
            if snapshot is not None:
                response.epoch = snapshot.epoch
                response.deployment_key = snapshot.deployment.key
                to_proto(snapshot.deployment, response.deployment)
            if loop.records:
                to_proto(loop.records[-1], response.last_tick)
            for ticket in loop.switches:
                to_proto(ticket, response.switches.add())
        return response

    async def WatchDecisions(self, request: Any, context: Any) -> AsyncIterator[Any]:
        with self._loop.lock:
            last = self._loop.records[-1].seq if self._loop.records else 0
        wanted = request.from_seq or last + 1
        if not 0 < wanted <= last + 1:
            raise InvalidRequestError(
                f"from_seq is {wanted}, the next tick of this controller is {last + 1}; it was "
                "started again since: watch from 1, or from 0 for ticks to come."
            )
        while True:
            for record in await asyncio.to_thread(self._since, wanted):
                response = control_pb2.WatchDecisionsResponse(num_lost=record.seq - wanted)
                to_proto(record, response.record)
                yield response
                wanted = record.seq + 1

    def _since(self, seq: int) -> list[TickRecord]:
        """Records from `seq` on; waits a little while there are none."""
        loop = self._loop
        with loop.changed:
            if not loop.records or loop.records[-1].seq < seq:
                loop.changed.wait(WATCH_POLL_S)
            return [r for r in loop.records if r.seq >= seq]

    async def ProposeSwitch(self, request: Any, context: Any) -> Any:
        if not request.target_key:
            raise InvalidRequestError("target_key is empty; give a deployment such as '2xtp2pp1'.")
        proposal = await asyncio.to_thread(
            self._operations.propose, request.target_key, request.dry_run
        )
        plan = proposal.decision.plan
        response = control_pb2.ProposeSwitchResponse(
            accepted=not proposal.vetoes,
            applied=proposal.ticket is not None,
            vetoes=proposal.vetoes,
            target_key=proposal.decision.chosen_key,
            decision_id=proposal.decision.decision_id,
        )
        if plan is not None:
            response.weight_bytes = plan.weight_bytes
            response.lower_bound_bytes = plan.lower_bound_bytes
            response.predicted_s = plan.predicted_s
            response.num_transfers = len(plan.transfers)
            response.expected_epoch = plan.expected_epoch
            to_proto(plan.target, response.target)
        if proposal.ticket is not None:
            to_proto(proposal.ticket, response.ticket)
        return response

    async def SetMode(self, request: Any, context: Any) -> Any:
        if request.mode not in MODES:
            raise InvalidRequestError(
                f"mode is {request.mode}; expected MODE_ACTIVE, MODE_ADVISORY or MODE_OFF."
            )
        previous = await asyncio.to_thread(self._operations.set_mode, MODES[request.mode])
        return control_pb2.SetModeResponse(mode=request.mode, previous=NUMBERS[previous])


async def start_grpc(loop: ControlLoop, host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """Start the service; returns the server and its port. Raises UnavailableError: port in use."""
    servicer = ControlService(loop)

    def add(server: grpc.aio.Server) -> None:
        control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)

    return await start_server(add, SERVICE_NAME, host, port)
