"""The rank process of one device: command loop, serving loop, a thread that migrates beside it.

The main thread serves: it steps the rank that is active here and answers what concerns requests.
Calls that build, move or bind go to the migration thread, so that the old generation decodes on
while the next one is made.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
import zmq

from engine.block_manager import BlockManager
from engine.cluster import Transfer
from engine.executor import WorkerConfig
from engine.messages import (
    MIGRATION_CALLS,
    Abort,
    Activate,
    AdoptSequences,
    BindRank,
    BuildRank,
    Call,
    CloseTransfer,
    Hello,
    ImportSequences,
    KvMove,
    MoveKv,
    MoveWeights,
    OpenTransfer,
    Quiesce,
    RankFailed,
    ReleaseRank,
    Reply,
    Resume,
    Shutdown,
    Submit,
    Tokens,
    TokenUpdate,
    decode_to_worker,
    encode,
)
from engine.migration.transfer import fill_local, move_kv, move_weights, shard_view
from engine.parallel import build_group, build_parallel_state
from engine.replica import Follower, RankState, Replica
from engine.runner import ModelRunner, load_weights
from engine.scheduler import BatchScheduler
from engine.shards import Shard

logger = logging.getLogger(__name__)
HEARTBEAT_S = 0.2


class Worker:
    """Owns everything on one device: at most two ranks, of which one serves."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = self.context.socket(zmq.DEALER)
        self.control.setsockopt(zmq.IDENTITY, f"w{config.device}".encode())
        self.ranks: dict[int, RankState] = {}
        self.serving: dict[int, Replica | Follower] = {}
        self.calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._transfer_group: Any = None
        self._members: list[int] = []
        self._last_heartbeat_s = 0.0
        self._stopping = False

    # ---------------------------------------------------------------- life

    def run(self) -> None:
        """Serve until told to shut down. The only place that ends this process in order."""
        torch.set_num_threads(1)
        self.control.connect(f"ipc://{self.run_dir}/engine")
        wake = self.context.socket(zmq.PAIR)
        wake.bind("inproc://replies")
        migration = threading.Thread(target=self._migrate, name="migration", daemon=True)
        migration.start()
        self._send(Hello(self.config.device, os.getpid()))
        while not self._stopping:
            self._poll(wake)
            self._step_all()
            self._heartbeat()
        self.calls.put(None)
        self.context.destroy(linger=200)

    def _send(self, message: Any) -> None:
        self.control.send(encode(message))

    def _poll(self, wake: Any) -> None:
        """Take every message that has come; wait for one only when there is nothing to step."""
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        busy = False
        for serving in self.serving.values():
            if isinstance(serving, Follower):
                poller.register(serving.inputs, zmq.POLLIN)
            else:
                busy = busy or serving.wants_to_step
        poller.poll(0 if busy else int(HEARTBEAT_S * 1000))
        while wake.poll(0):
            self.control.send(wake.recv())
        while self.control.poll(0):
            self._handle(decode_to_worker(self.control.recv()))

    def _step_all(self) -> None:
        for replica_id, serving in list(self.serving.items()):
            try:
                if isinstance(serving, Follower):
                    serving.step()
                elif serving.wants_to_step:
                    updates = serving.step(wait_ms=20)
                    if updates is not None:
                        self._send_tokens(replica_id, serving, updates)
            except RuntimeError as error:  # a peer's death ends a collective like this
                self._fail(replica_id, error)

    def _send_tokens(self, replica_id: int, replica: Replica, updates: list[TokenUpdate]) -> None:
        self._last_heartbeat_s = time.monotonic()
        self._send(Tokens(replica_id, updates, replica.stats()))

    def _heartbeat(self) -> None:
        if time.monotonic() - self._last_heartbeat_s < HEARTBEAT_S:
            return
        self._last_heartbeat_s = time.monotonic()
        for replica_id, serving in self.serving.items():
            if isinstance(serving, Replica):
                self._send(Tokens(replica_id, [], serving.stats()))

    def _fail(self, replica_id: int, error: BaseException) -> None:
        logger.warning("device %d: replica %d failed: %s", self.config.device, replica_id, error)
        self._release(replica_id)
        self._send(RankFailed(self.config.device, replica_id, str(error)[:500]))

    # ---------------------------------------------------------------- messages

    def _handle(self, message: Any) -> None:
        if isinstance(message, MIGRATION_CALLS):
            self.calls.put(message)
            return
        match message:
            case Submit():
                # a rank that failed a moment ago is gone; the engine will hear and send it again
                if message.replica_id in self.ranks:
                    self._leader(message.replica_id).submit(message.sequence)
            case Abort():
                if message.replica_id in self.serving:
                    self._leader(message.replica_id).scheduler.abort(message.request_id)
            case Shutdown():
                self._stopping = True
            case _:
                self._send(self._answer(message))

    def _answer(self, call: Call) -> Reply:
        """Carry out a call on the serving side; a failure is the caller's to handle."""
        try:
            match call:
                case Activate():
                    self._activate(call.replica_id)
                case Quiesce():
                    return self._quiesce(call)
                case Resume():
                    self._leader(call.replica_id).resume()
                case ImportSequences():
                    leader = self._leader(call.replica_id)
                    tables, to_fill = leader.import_sequences(call.sequences)
                    return Reply(call.call_id, block_tables=tables, blocks_to_fill=to_fill)
                case AdoptSequences():
                    self._leader(call.replica_id).adopt(call.recompute)
                case ReleaseRank():
                    self._release(call.replica_id)
            return Reply(call.call_id)
        except Exception as error:
            logger.exception("device %d: %s failed", self.config.device, type(call).__name__)
            return Reply(call.call_id, error=f"{type(error).__name__}: {error}")

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
            self.serving[replica_id] = Replica(state, scheduler, self.context, self.run_dir)
        leader = self.serving[replica_id]
        assert isinstance(leader, Replica), replica_id
        return leader

    def _activate(self, replica_id: int) -> None:
        if self.ranks[replica_id].is_leader:
            self._leader(replica_id).active = True
        else:
            state = self.ranks[replica_id]
            self.serving[replica_id] = Follower(state, self.context, self.run_dir)

    def _quiesce(self, call: Quiesce) -> Reply:
        leader = self._leader(call.replica_id)
        sequences, updates = leader.quiesce()
        self._send_tokens(call.replica_id, leader, updates)
        return Reply(call.call_id, sequences=sequences)

    def _release(self, replica_id: int) -> None:
        serving = self.serving.pop(replica_id, None)
        if serving is not None:
            serving.close()
        self.ranks.pop(replica_id, None)

    # ---------------------------------------------------------------- the migration thread

    def _migrate(self) -> None:
        wake = self.context.socket(zmq.PAIR)
        wake.connect("inproc://replies")
        while (call := self.calls.get()) is not None:
            try:
                reply = self._execute(call)
            except Exception as error:
                logger.exception("device %d: %s failed", self.config.device, type(call).__name__)
                reply = Reply(call.call_id, error=f"{type(error).__name__}: {error}")
            wake.send(encode(reply))
        wake.close(0)

    def _execute(self, call: Call) -> Reply:
        match call:
            case BuildRank():
                self._build(call)
            case OpenTransfer():
                self._members = call.devices
                rank = call.devices.index(self.config.device)
                self._transfer_group = build_group(
                    self.run_dir,
                    f"move-{call.nonce}",
                    rank,
                    len(call.devices),
                    self.config.group_timeout_s,
                )
            case MoveWeights():
                return Reply(call.call_id, checksums=self._move_weights(call))
            case BindRank():
                state = self.ranks[call.replica_id]
                state.runner.bind(state.weights)
            case MoveKv():
                return Reply(call.call_id, checksums=self._move_kv(call.moves))
            case CloseTransfer():
                self._transfer_group = None
        return Reply(call.call_id)

    def _build(self, call: BuildRank) -> None:
        spec, config = call.spec, self.config
        groups = build_parallel_state(
            self.run_dir,
            f"{spec.nonce}-{spec.replica_id}",
            spec.parallel,
            spec.rank,
            config.group_timeout_s,
        )
        runner = ModelRunner(
            Path(config.model_dir),
            spec.parallel,
            spec.rank,
            spec.num_blocks,
            config.block_size,
            config.dtype,
            config.torch_device,
            groups.all_reduce if spec.parallel.tp > 1 else None,
        )
        if call.from_disk:
            weights = load_weights(Path(config.model_dir), runner)
        else:
            weights = fill_local(runner.spec, runner.shards, self._held(), runner.dtype)
        self.ranks[spec.replica_id] = RankState(spec, runner, groups, weights)

    def _held(self) -> dict[str, tuple[Shard, torch.Tensor]]:
        """Shards of the rank that serves here, if any."""
        held: dict[str, tuple[Shard, torch.Tensor]] = {}
        for replica_id in list(self.serving):
            state = self.ranks[replica_id]
            held |= {s.tensor: (s, state.weights[s.tensor]) for s in state.runner.shards}
        return held

    def _move_weights(self, call: MoveWeights) -> list[tuple[int, int]]:
        held = self._held()

        def source(transfer: Transfer) -> torch.Tensor:
            shard, tensor = held[transfer.tensor]
            return shard_view(tensor, shard, transfer.start, transfer.stop)

        def target(index: int, transfer: Transfer) -> torch.Tensor:
            state = self.ranks[call.dst_replicas[index]]
            shard = next(s for s in state.runner.shards if s.tensor == transfer.tensor)
            return shard_view(state.weights[shard.tensor], shard, transfer.start, transfer.stop)

        return move_weights(
            self._transfer_group,
            self._members,
            self.config.device,
            call.transfers,
            source,
            target,
        )

    def _move_kv(self, moves: list[KvMove]) -> list[tuple[int, int]]:
        def read(move: KvMove) -> torch.Tensor:
            kv = self.ranks[move.src_replica].runner.kv
            return kv.read_blocks(move.src_blocks, move.src_layers, move.src_heads)

        def shape(move: KvMove) -> tuple[tuple[int, ...], torch.dtype]:
            kv = self.ranks[move.dst_replica].runner.kv
            layers = move.dst_layers[1] - move.dst_layers[0]
            heads = move.dst_heads[1] - move.dst_heads[0]
            size = (2, layers, len(move.dst_blocks), kv.block_size, heads, kv.data.shape[5])
            return size, kv.data.dtype

        def write(move: KvMove, tensor: torch.Tensor) -> None:
            kv = self.ranks[move.dst_replica].runner.kv
            kv.write_blocks(move.dst_blocks, move.dst_layers, move.dst_heads, tensor)

        return move_kv(
            self._transfer_group, self._members, self.config.device, moves, read, shape, write
        )


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def run_worker(config: WorkerConfig) -> None:
    """Entry point of a worker process. Ctrl-C is the engine's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, name="parent-watch", daemon=True).start()
    Worker(config).run()
