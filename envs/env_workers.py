"""Worker processes that step serving environments, each several.

Actions, observations, masks and rewards lie in memory that all of them share; over the pipes go
commands and what a step's info holds beside them.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnavailableError
from envs.env_pool import EnvPool
from envs.serving_env import ServingEnv
from policies.base import Floats, Mask, ObservationSpec

# the environments of these numbers; pickled, so a function of a module or a partial of one
MakeEnvs = Callable[[Sequence[int]], list[ServingEnv]]
Info = dict[str, Any]
REPLY_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 5.0
LARGE = frozenset({"decision", "outcomes", "traffic"})  # of an info, left with the worker


class Board:
    """Row i is environment i's: flats [N, F], masks [N, K], actions, rewards and dones [N]."""

    def __init__(self, memory: Any, spec: ObservationSpec, num_envs: int) -> None:
        rows, self._memory, self._used = num_envs, memory, 0
        self.flats: Floats = self._take(np.float32, rows, spec.flat_size)
        self.masks: Mask = self._take(np.bool_, rows, spec.max_candidates)
        self.actions: NDArray[np.int64] = self._take(np.int64, rows)
        self.rewards: NDArray[np.float64] = self._take(np.float64, rows)
        self.dones: NDArray[np.bool_] = self._take(np.bool_, rows)

    def _take(self, dtype: type[Any], *shape: int) -> NDArray[Any]:
        count, offset = int(np.prod(shape)), -(-self._used // 64) * 64
        self._used = offset + count * np.dtype(dtype).itemsize
        return np.frombuffer(self._memory, dtype, count, offset).reshape(shape)

    @staticmethod
    def num_bytes(spec: ObservationSpec, num_envs: int) -> int:
        return num_envs * (4 * spec.flat_size + spec.max_candidates + 8 + 8 + 1) + 5 * 64


@dataclass(slots=True)
class _Worker:
    """What is kept of a worker where it was started."""

    process: Any  # multiprocessing names no common type of its contexts' processes
    pipe: Connection
    numbers: list[int]  # of its environments


class EnvWorkers:
    """Owns `num_workers` processes with `num_envs` environments between them, those of a worker
    next to each other. They end with `close`, and by themselves when this process is gone."""

    def __init__(
        self,
        make_envs: MakeEnvs,
        spec: ObservationSpec,
        num_envs: int,
        num_workers: int,
        num_threads: int = 1,
    ) -> None:
        """`num_threads` in each worker. Every worker builds its environments; a failure there
        comes with the first reply."""
        assert 1 <= num_workers <= num_envs, (num_workers, num_envs)
        context = get_context("forkserver")
        memory = context.RawArray("b", Board.num_bytes(spec, num_envs))
        self.board = Board(memory, spec, num_envs)
        self._workers: list[_Worker] = []
        for part in np.array_split(np.arange(num_envs), num_workers):
            ours, theirs = context.Pipe()
            numbers = part.tolist()
            process = context.Process(
                target=_work,
                args=(theirs, memory, spec, num_envs, make_envs, numbers, num_threads),
                name=f"env-worker-{len(self._workers)}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, numbers))

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [worker.process.pid for worker in self._workers]

    def reset(self, seeds: Sequence[int | None], options: Sequence[Any]) -> list[Info]:
        """Observations and masks are on the board then."""
        for worker in self._workers:
            given = [(seeds[i], options[i] or None) for i in worker.numbers]
            self._send(worker, "reset", given)
        return [info for infos in self._replies(self._workers) for info in infos]

    def begin_step(self, actions: NDArray[np.int64]) -> None:
        self.board.actions[:] = actions
        for worker in self._workers:
            self._send(worker, "step", None)

    def finish_step(self) -> list[tuple[Info, Info | None]]:
        """Info of the step, without what is LARGE, and of the next episode's start where one was
        done; the rest is on the board."""
        return [infos for of_worker in self._replies(self._workers) for infos in of_worker]

    def ask(self, question: str, payload: Any, chosen: Iterable[int]) -> list[Any]:
        """Of each of these environments: `has`, `get`, `set` or `call` an attribute."""
        wanted = list(chosen)
        asked = [w for w in self._workers if set(w.numbers) & set(wanted)]
        for worker in asked:
            here = [i - worker.numbers[0] for i in worker.numbers if i in wanted]
            self._send(worker, question, (here, payload))
        numbers = [i for worker in asked for i in worker.numbers if i in wanted]
        values = [value for of_worker in self._replies(asked) for value in of_worker]
        found = dict(zip(numbers, values, strict=True))
        return [found[i] for i in wanted]

    def close(self) -> None:
        """Idempotent; none is left afterwards."""
        for worker in self._workers:
            worker.pipe.close()  # it ends when it reads that, or when its step is done
        for worker in self._workers:
            for end in (lambda: None, worker.process.terminate, worker.process.kill):
                end()
                worker.process.join(CLOSE_TIMEOUT_S)
                if not worker.process.is_alive():
                    break
        self._workers = []

    def _send(self, worker: _Worker, command: str, payload: Any) -> None:
        try:
            worker.pipe.send((command, payload))
        except OSError as error:
            raise self._lost(worker) from error

    def _replies(self, workers: Sequence[_Worker]) -> list[list[Any]]:
        """All are read before the first failure is raised: none is left to be taken for the answer
        to a later command."""
        replies = [self._reply(worker) for worker in workers]
        for worker, (error, _) in zip(workers, replies, strict=True):
            if isinstance(error, AttributeError):
                raise error
            if error is not None:
                raise UnavailableError(f"{worker.process.name} failed:\n{error}")
        return [found for _, found in replies]

    def _reply(self, worker: _Worker) -> tuple[Any, list[Any]]:
        """Error, and what was found."""
        try:
            if not worker.pipe.poll(REPLY_TIMEOUT_S):
                raise UnavailableError(
                    f"{worker.process.name} has not replied within {REPLY_TIMEOUT_S:.0f} s."
                )
            error, found = worker.pipe.recv()
        except (EOFError, OSError) as lost:
            raise self._lost(worker) from lost
        return error, found

    def _lost(self, worker: _Worker) -> UnavailableError:
        worker.process.join(CLOSE_TIMEOUT_S)
        return UnavailableError(
            f"{worker.process.name} has ended with exit code {worker.process.exitcode}; see what "
            "it wrote to stderr, or set env.num_workers to 0."
        )


# --------------------------------------------------------------------------------------
# In the worker


def _work(
    pipe: Connection,
    memory: Any,
    spec: ObservationSpec,
    num_envs: int,
    make_envs: MakeEnvs,
    numbers: list[int],
    num_threads: int,
) -> None:
    """Until the other end of the pipe is closed. A Ctrl-C is its owner's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    desk: _Desk | None = None
    while True:
        try:
            command, payload = pipe.recv()
        except (EOFError, OSError):
            break
        reply: tuple[Any, Any]
        try:
            if desk is None:
                board = Board(memory, spec, num_envs)
                desk = _Desk(board, EnvPool(make_envs(numbers), num_threads), numbers)
            reply = None, desk.answer(command, payload)
        except Exception as error:
            is_known = command == "get" and isinstance(error, AttributeError)
            reply = error if is_known else traceback.format_exc(), None
        try:
            pipe.send(reply)
        except OSError:
            break
    if desk is not None:
        desk.pool.close()


class _Desk:
    """The environments of a worker, and its rows of the board."""

    def __init__(self, board: Board, pool: EnvPool, numbers: list[int]) -> None:
        rows = slice(numbers[0], numbers[-1] + 1)
        self.pool, self._flats, self._masks = pool, board.flats[rows], board.masks[rows]
        self._actions, self._dones = board.actions[rows], board.dones[rows]
        self._rewards = board.rewards[rows]

    def answer(self, command: str, payload: Any) -> list[Any]:
        if command == "step":
            return self._step()
        if command == "reset":
            return self._reset(payload)
        here, question = payload
        return [_answer(self.pool.envs[i], command, *question) for i in here]

    def _step(self) -> list[tuple[Info, Info | None]]:
        infos = []
        for i, found in enumerate(self.pool.step_on(self._actions)):
            self._flats[i], self._rewards[i], self._dones[i] = found.flat, found.reward, found.done
            self._masks[i] = self.pool.envs[i].action_masks()
            small = {key: value for key, value in found.info.items() if key not in LARGE}
            infos.append((small, found.reset_info))
        return infos

    def _reset(self, given: list[tuple[int | None, Any]]) -> list[Info]:
        """`given` are seeds and options."""
        infos = []
        for i, (env, (seed, options)) in enumerate(zip(self.pool.envs, given, strict=True)):
            self._flats[i], info = env.reset(seed=seed, options=options)
            self._masks[i] = env.action_masks()
            infos.append(info)
        return infos


def _answer(env: ServingEnv, command: str, name: str, *arguments: Any) -> Any:
    if command == "has":
        return hasattr(env, name)
    if command == "get":
        return getattr(env, name)
    if command == "set":
        return setattr(env, name, *arguments)
    assert command == "call", command
    positional, named = arguments
    return getattr(env, name)(*positional, **named)
