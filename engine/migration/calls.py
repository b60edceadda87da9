"""What a worker does for a switch, on its migration thread: build ranks, move and bind tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import zmq

from engine.cluster import DISK, Transfer
from engine.executor import WorkerConfig
from engine.memory import release_memory
from engine.messages import (
    BindRank,
    BuildRank,
    Call,
    CloseTransfer,
    FreeShards,
    HostStore,
    KvMove,
    MakeShards,
    MoveKv,
    MoveWeights,
    OpenTransfer,
    Reply,
)
from engine.migration.transfer import (
    Moved,
    Pace,
    exchange,
    fill_local,
    kv_jobs,
    shard_view,
    weight_jobs,
)
from engine.packing import dense
from engine.parallel import (
    GroupConfig,
    build_gloo,
    build_parallel_state,
    host_store,
    meet,
    open_store,
)
from engine.replica import RankState
from engine.runner import ModelRunner, load_weights
from engine.shards import Shard
from engine.sockets import Sockets
from engine.weights import CheckpointReader


def torch_device(config: WorkerConfig) -> torch.device:
    """Where this worker computes: devices share the GPUs of their machine in turn."""
    if config.torch_device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("device is 'cuda', but torch finds no CUDA device; serve with 'cpu'.")
    return torch.device("cuda", config.device % torch.cuda.device_count())


def _is_among(need: Shard, held: Mapping[str, tuple[Shard, torch.Tensor]]) -> bool:
    return need.tensor in held and held[need.tensor][0] == need


class MigrationCalls:
    """Executes the MIGRATION_CALLS of one worker, one at a time. Owns the transfer group and the
    stores that no group has taken yet; `ranks` and `serving` are the worker's."""

    def __init__(
        self,
        config: WorkerConfig,
        device: torch.device,
        sockets: Sockets,
        ranks: dict[int, RankState],
        serving: Mapping[int, Any],
    ) -> None:
        self._config, self._sockets, self._ranks, self._serving = config, sockets, ranks, serving
        self._groups = GroupConfig(
            config.host, device, config.group_timeout_s, config.stage_tensors
        )
        self._abandoned: set[str] = set()  # stores at which nobody is to be waited for
        self._hosted: dict[str, Any] = {}  # stores by address, until their group is built
        self._transfer: tuple[Any, Any] | None = None  # group and its store
        self._members: list[int] = []
        self._pace = Pace(config.switch_bytes_per_s)

    def execute(self, call: Call) -> Reply:
        """Carry out one call. Whatever it raises is the reply's error."""
        match call:
            case HostStore():
                return Reply(call.call_id, endpoint=self._host_store(call.name))
            case OpenTransfer():
                self._open_transfer(call)
            case BuildRank():
                return Reply(call.call_id, endpoint=self._build(call))
            case MoveWeights() | MoveKv():
                moved = self._move(call)
                return Reply(call.call_id, checksums=moved.checksums, sent_bytes=moved.sent_bytes)
            case BindRank():
                state = self._ranks[call.replica_id]
                state.runner.bind(state.weights)
                release_memory()  # the plain forms of weights that are packed now
            case MakeShards():
                self._make_shards(call)
            case FreeShards():
                self._free_shards(call)
            case CloseTransfer():
                self._transfer = None
                self._hosted.clear()
                self._abandoned.clear()
                release_memory()  # the ranks of the old generation are gone, or of a new one
        return Reply(call.call_id)

    def _host_store(self, name: str) -> str:
        config = self._config
        store, address = host_store(config.run_dir, name, config.host, config.group_timeout_s)
        self._hosted[address] = store
        return address

    def abandon(self, address: str) -> None:
        """From any thread: whoever waits at this store, or will, gives up."""
        self._abandoned.add(address)

    def _meet(self, address: str, rank: int, size: int) -> Any:
        """The store at this address, once all `size` ranks have come to it."""
        store = self._hosted.pop(address, None)
        store = store or open_store(address, size, self._config.group_timeout_s)
        timeout_s = self._config.group_timeout_s
        meet(store, rank, size, timeout_s, lambda: address in self._abandoned)
        return store

    def _open_transfer(self, call: OpenTransfer) -> None:
        self._members, size = call.devices, len(call.devices)
        rank = call.devices.index(self._config.device)
        store = self._meet(call.store, rank, size)
        self._transfer = (build_gloo(self._groups, store, "move", rank, size), store)
        self._pace = Pace(self._config.switch_bytes_per_s)

    # ---------------------------------------------------------------- ranks

    def _build(self, call: BuildRank) -> str:
        """Make the rank and the socket for its inputs; the endpoint of that."""
        spec, config = call.spec, self._config
        size = spec.parallel.num_devices
        store = self._meet(call.store, spec.rank, size) if call.store else None
        groups = build_parallel_state(self._groups, store, spec.parallel, spec.rank)
        runner = ModelRunner(
            Path(config.model_dir),
            spec.parallel,
            spec.rank,
            spec.num_blocks,
            config.block_size,
            config.dtype,
            str(self._groups.device),
            groups.all_reduce if spec.parallel.tp > 1 else None,
            num_threads=config.num_threads,
        )
        if call.from_disk:
            weights = load_weights(Path(config.model_dir), runner)
        else:
            held = self._held()
            needs = [s for s in runner.shards if not call.is_bare or _is_among(s, held)]
            weights = fill_local(runner.spec, needs, held, runner.dtype, self._groups.device)
        name = f"in-{spec.nonce}-{spec.replica_id}-{spec.rank}"
        inputs, endpoint = self._sockets.bind(zmq.PULL, name)
        self._ranks[spec.replica_id] = RankState(spec, runner, groups, weights, inputs)
        return endpoint

    def _held(self) -> dict[str, tuple[Shard, torch.Tensor]]:
        """Shards of the rank that serves here, if any. A new leader may be there already, to
        take sequences in, before it serves: what it holds is only coming."""
        held: dict[str, tuple[Shard, torch.Tensor]] = {}
        for replica_id, serving in list(self._serving.items()):
            if not serving.active:
                continue
            state = self._ranks[replica_id]
            held |= {
                s.tensor: (s, state.weights[s.tensor])
                for s in state.runner.shards
                if s.tensor in state.weights
            }
        return held

    # ---------------------------------------------------------------- in place

    def _make_shards(self, call: MakeShards) -> None:
        for replica_id in list(self._serving):
            self._park(self._ranks[replica_id], call.parked)
        state, held = self._ranks[call.replica_id], self._held()
        needs = [s for s in state.runner.shards if s.tensor in set(call.tensors)]
        device = self._groups.device
        state.weights |= fill_local(state.runner.spec, needs, held, state.runner.dtype, device)

    def _park(self, state: RankState, tensors: list[str]) -> None:
        for name in state.weights.keys() & set(tensors):
            state.runner.model.unbind()
            if state.weights[name].device.type != "cpu":
                state.weights[name] = state.weights[name].to("cpu")

    def _free_shards(self, call: FreeShards) -> None:
        state = self._ranks[call.replica_id]
        state.runner.model.unbind()
        for name in call.tensors:
            del state.weights[name]
        release_memory()

    # ---------------------------------------------------------------- moves

    def _move(self, call: MoveWeights | MoveKv) -> Moved:
        try:
            if isinstance(call, MoveWeights):
                return self._move_weights(call)
            return self._move_kv(call)
        except Exception:
            self._transfer = None  # leaving the group ends the waits of those at the other ends
            raise

    def _move_weights(self, call: MoveWeights) -> Moved:
        held = self._held()
        dense_of: dict[str, torch.Tensor] = {}  # the plain form of the tensor sent last

        def is_held(transfer: Transfer) -> bool:
            shard = held[transfer.tensor][0] if transfer.tensor in held else None
            return shard is not None and shard.start <= transfer.start < transfer.stop <= shard.stop

        def source(transfer: Transfer) -> torch.Tensor:
            if not is_held(transfer):  # it came by an earlier transfer
                return self._new_slice(transfer, call.src_replicas[transfer.src])
            shard, tensor = held[transfer.tensor]
            if transfer.tensor not in dense_of:
                dense_of.clear()
                dense_of[transfer.tensor] = dense(tensor)
            return shard_view(dense_of[transfer.tensor], shard, transfer.start, transfer.stop)

        def target(index: int) -> torch.Tensor:
            return self._new_slice(call.transfers[index], call.dst_replicas[index])

        device, transfers = self._config.device, call.transfers
        self._read_from_disk(call)
        jobs = weight_jobs(
            self._members, device, call.first_index, transfers, source, target,
            lambda transfer: not is_held(transfer),
        )  # fmt: skip
        return exchange(self._group, jobs, self._pace)

    def _new_slice(self, transfer: Transfer, replica_id: int) -> torch.Tensor:
        """The part of a new rank's shard that a transfer fills."""
        state = self._ranks[replica_id]
        shard = next(s for s in state.runner.shards if s.tensor == transfer.tensor)
        return shard_view(state.weights[shard.tensor], shard, transfer.start, transfer.stop)

    def _read_from_disk(self, call: MoveWeights) -> None:
        """What no device holds any more."""
        wanted = [
            (transfer, replica_id)
            for transfer, replica_id in zip(call.transfers, call.dst_replicas, strict=True)
            if transfer.src == DISK and transfer.dst == self._config.device
        ]
        if not wanted:
            return
        with CheckpointReader(Path(self._config.model_dir), self._config.dtype) as reader:
            for t, replica_id in wanted:
                part = Shard(t.tensor, t.dim, t.start, t.stop, t.nbytes)
                self._new_slice(t, replica_id).copy_(reader.read(part))

    def _move_kv(self, call: MoveKv) -> Moved:
        def read(move: KvMove) -> torch.Tensor:
            kv = self._ranks[move.src_replica].runner.kv
            return kv.read_blocks(move.src_blocks, move.src_layers, move.src_heads)

        def shape(move: KvMove) -> tuple[tuple[int, ...], torch.dtype]:
            kv = self._ranks[move.dst_replica].runner.kv
            layers = move.dst_layers[1] - move.dst_layers[0]
            heads = move.dst_heads[1] - move.dst_heads[0]
            size = (2, layers, len(move.dst_blocks), kv.block_size, heads, kv.data.shape[5])
            return size, kv.data.dtype

        def write(move: KvMove, tensor: torch.Tensor) -> None:
            kv = self._ranks[move.dst_replica].runner.kv
            kv.write_blocks(move.dst_blocks, move.dst_layers, move.dst_heads, tensor)

        jobs = kv_jobs(self._members, self._config.device, call.moves, read, shape, write)
        return exchange(self._group, jobs, Pace(0) if call.is_last else self._pace)

    @property
    def _group(self) -> Any:
        assert self._transfer is not None, "no transfer is open"
        return self._transfer[0]
