"""The rank process of one device: command loop, serving loop, a thread that migrates beside it.

The main thread serves: it steps the rank that is active here and answers what concerns requests.
Calls that build, move or bind go to the migration thread, so that the old generation decodes on
while the next one is made.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing import connection, parent_process
from typing import Any

import msgspec
import numba
import torch
import zmq

from engine.block_manager import BlockManager
from engine.errors import StaleEpochError
from engine.executor import WorkerConfig
from engine.fence import Fence
from engine.memory import keep_freed_memory, release_memory
from engine.messages import (
    Abandon,
    Abort,
    Activate,
    AdoptSequences,
    Beat,
    Call,
    Hello,
    ImportSequences,
    LimitBlocks,
    Quiesce,
    RankFailed,
    ReleaseRank,
    Reply,
    Resume,
    Shutdown,
    SizeKv,
    Submit,
    TakeSequences,
    Tokens,
    TokenUpdate,
    decode_to_worker,
    encode,
)
from engine.migration.calls import MigrationCalls, torch_device
from engine.replica import Follower, RankState, Replica
from engine.scheduler import BatchScheduler
from engine.sockets import Sockets

logger = logging.getLogger(__name__)
HEARTBEAT_S = 0.5  # signs of life
STATS_S = 0.2  # load of an idle leader
MIGRATION_POLL_S = 0.2


class Worker:
    """Owns everything on one device: at most two ranks, of which one serves."""

    def __init__(self, config: WorkerConfig) -> None:
        keep_freed_memory()
        self.config = config
        self.sockets = Sockets(zmq.Context(), config.run_dir, config.host, config.keys)
        self.control = self._connect("w")
        self.ranks: dict[int, RankState] = {}
        self.serving: dict[int, Replica | Follower] = {}
        self.fence = Fence()
        self._migration = MigrationCalls(
            config, torch_device(config), self.sockets, self.ranks, self.serving
        )
        self._last_stats_s = 0.0
        self._may_step = False  # whether there may be more to do before a message comes
        self._stopping = False
        self._ended = threading.Event()

    # ---------------------------------------------------------------- life

    def run(self) -> None:
        """Serve until told to shut down. The only place that ends this process in order."""
        _use_threads(self.config.num_threads)
        migration = threading.Thread(target=self._migrate, name="migration", daemon=True)
        migration.start()
        self._send(Hello(self.config.device, os.getpid()))
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        while not self._stopping:
            self._poll()
            self._step_all()
            self._send_stats()
        self._ended.set()
        heart.join()
        migration.join(2 * MIGRATION_POLL_S)  # it may be waiting for a peer
        self.sockets.close()

    def _connect(self, kind: str) -> Any:
        identity = f"{kind}{self.config.device}.{self.config.incarnation}".encode()
        return self.sockets.connect(zmq.DEALER, self.config.engine_endpoint, identity)

    def _beat(self) -> None:
        socket = self._connect("b")
        while not self._ended.wait(HEARTBEAT_S):
            socket.send(encode(Beat()))
        socket.close(0)

    def _send(self, message: Any) -> None:
        self.control.send(encode(message))

    def _poll(self) -> None:
        """Take every message that has come; wait for one, or for the result of a step, only when
        there is nothing to step."""
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        for serving in self.serving.values():
            poller.register(serving.inputs, zmq.POLLIN)
        poller.poll(0 if self._may_step else int(STATS_S * 1000))
        for fence, message in self._received(self.control):
            self._handle(fence, message)

    def _received(self, socket: Any) -> list[tuple[int, Any]]:
        """All messages that have come, with their fences, before any is acted upon."""
        arrived = []
        while socket.poll(0):
            fence, data = socket.recv_multipart()
            arrived.append((self.fence.raise_to(int(fence)), decode_to_worker(data)))
        return arrived

    def _step_all(self) -> None:
        self._may_step = False
        for replica_id, serving in list(self.serving.items()):
            try:
                if isinstance(serving, Follower):
                    self._may_step |= serving.step()
                elif serving.wants_to_step:
                    updates = serving.step()
                    self._may_step |= updates is not None or not serving.waits
                    if updates is not None:
                        self._send_tokens(replica_id, serving, updates)
            except RuntimeError as error:  # a peer's death ends a collective like this
                self._fail(replica_id, error)

    def _send_tokens(self, replica_id: int, replica: Replica, updates: list[TokenUpdate]) -> None:
        self._last_stats_s = time.monotonic()
        self._send(Tokens(replica_id, updates, replica.stats(), replica.last_step))

    def _send_stats(self) -> None:
        if time.monotonic() - self._last_stats_s < STATS_S:
            return
        self._last_stats_s = time.monotonic()
        for replica_id, serving in self.serving.items():
            if isinstance(serving, Replica):
                self._send(Tokens(replica_id, [], serving.stats()))

    def _fail(self, replica_id: int, error: BaseException) -> None:
        logger.warning("device %d: replica %d failed: %s", self.config.device, replica_id, error)
        self._release(replica_id)
        self._send(RankFailed(self.config.device, replica_id, str(error)[:500]))

    # ---------------------------------------------------------------- messages

    def _handle(self, fence: int, message: Any) -> None:
        match message:
            case Submit():
                # a rank that failed a moment ago is gone; the engine will hear and send it again
                if message.replica_id in self.ranks:
                    self._leader(message.replica_id).submit(message.sequence)
            case Abort():
                if message.replica_id in self.serving:
                    self._leader(message.replica_id).abort(message.request_id)
            case Shutdown():
                self._stopping = True
            case _:
                self._send(self._answer(fence, message, self._execute))

    def _answer(self, fence: int, call: Call, execute: Callable[[Call], Reply]) -> Reply:
        """Carry out a call, on either thread, unless its switch is over; a failure is the
        caller's to handle."""
        try:
            self.fence.check(fence)
            return execute(call)
        except StaleEpochError as error:
            logger.warning("device %d: %s: %s", self.config.device, type(call).__name__, error)
            return Reply(call.call_id, error=str(error), is_stale=True)
        except Exception as error:
            logger.exception("device %d: %s failed", self.config.device, type(call).__name__)
            return Reply(call.call_id, error=f"{type(error).__name__}: {error}")

    def _execute(self, call: Call) -> Reply:
        """Calls of the serving side."""
        match call:
            case Activate():
                self._activate(call.replica_id, call.peers)
            case TakeSequences():
                sequences = self._leader(call.replica_id).take_sequences()
                return Reply(call.call_id, sequences=sequences)
            case Quiesce():
                return self._quiesce(call)
            case Resume():
                self._leader(call.replica_id).resume()
            case LimitBlocks():
                self._leader(call.replica_id).scheduler.block_manager.limit(call.max_used)
            case ImportSequences():
                leader = self._leader(call.replica_id)
                tables, to_fill = leader.import_sequences(call.sequences)
                return Reply(call.call_id, block_tables=tables, blocks_to_fill=to_fill)
            case AdoptSequences():
                self._leader(call.replica_id).adopt(call.recompute)
            case SizeKv():
                self._size_kv(call)
            case Abandon():
                self._migration.abandon(call.store)
            case ReleaseRank():
                self._release(call.replica_id)
        return Reply(call.call_id)

    def _leader(self, replica_id: int) -> Replica:
        """The leader here, made on first use, before it is activated, for imports."""
        if replica_id not in self.serving:
            state, config = self.ranks[replica_id], self.config
            scheduler = BatchScheduler(
                BlockManager(
                    state.spec.num_blocks, config.block_size, config.enable_prefix_caching
                ),
                config.max_num_seqs,
                config.max_num_batched_tokens,
                config.max_model_len,
                config.eos_token_ids,
                num_stages=state.spec.parallel.pp,
            )
            self.serving[replica_id] = Replica(state, scheduler)
        leader = self.serving[replica_id]
        assert isinstance(leader, Replica), replica_id
        return leader

    def _activate(self, replica_id: int, peers: list[str]) -> None:
        state = self.ranks[replica_id]
        if state.is_leader:
            self._leader(replica_id).activate(self.sockets, peers)
        else:
            self.serving[replica_id] = Follower(state, self.sockets, peers)

    def _quiesce(self, call: Quiesce) -> Reply:
        leader = self._leader(call.replica_id)
        sequences, updates = leader.quiesce()
        self._send_tokens(call.replica_id, leader, updates)
        return Reply(call.call_id, sequences=sequences)

    def _size_kv(self, call: SizeKv) -> None:
        state, leader = self.ranks[call.replica_id], self.serving.get(call.replica_id)
        state.runner.size_kv(call.num_blocks)
        state.spec = msgspec.structs.replace(state.spec, num_blocks=call.num_blocks)
        if isinstance(leader, Replica):
            leader.start_over()
        release_memory()

    def _release(self, replica_id: int) -> None:
        serving = self.serving.pop(replica_id, None)
        if serving is not None:
            serving.close()
        state = self.ranks.pop(replica_id, None)
        if state is not None:
            state.inputs.close(0)

    # ---------------------------------------------------------------- the migration thread

    def _migrate(self) -> None:
        # A second team of threads would make OpenMP believe that the cores are taken, and let the
        # threads of the serving loop sleep between any two operations.
        _use_threads(1)
        socket = self._connect("m")  # of its own: a call need not wait for the end of a step
        socket.send(encode(Hello(self.config.device, os.getpid())))
        calls: deque[tuple[int, Call]] = deque()
        while not self._ended.is_set():
            if calls or socket.poll(int(MIGRATION_POLL_S * 1000)):
                calls += self._received(socket)
                fence, call = calls.popleft()
                socket.send(encode(self._answer(fence, call, self._migration.execute)))
        socket.close(0)


def _use_threads(count: int) -> None:
    """How many threads the calling thread computes with; the number is each thread's own."""
    numba.set_num_threads(min(count, numba.get_num_threads()))  # sets OpenMP's to all cores
    torch.set_num_threads(count)
    torch.get_num_threads()  # settles it: torch asks once per thread, and others may set it too


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def run_worker(config: WorkerConfig) -> None:
    """Entry point of a worker process. Ctrl-C is the engine's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker(config)
    threading.Thread(target=_die_with_parent, name="parent-watch", daemon=True).start()
    worker.run()
