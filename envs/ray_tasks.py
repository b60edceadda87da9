"""Functions as tasks of a Ray cluster: Ray is optional, and asked for only here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from engine.errors import InvalidRequestError, TidewrightError

Job = TypeVar("Job")
Result = TypeVar("Result")


class RayTasks:
    """Each has a CPU, and the folder that it was started from as its own."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._run = ray.remote(num_cpus=1)(_run_elsewhere)
        self.num_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def start(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._run.remote(os.getcwd(), function, arguments)

    def results(self, handles: Iterable[Any]) -> Iterator[Any]:
        """In the order of handles. TidewrightErrors are raised as they were there."""
        for handle in list(handles):
            try:
                yield self._ray.get(handle)
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, TidewrightError):
                    raise error.cause from None
                raise

    def first_of(self, handles: Sequence[Any]) -> Any:
        """The handle of a task that has ended; waits for one."""
        ended, _ = self._ray.wait(list(handles), num_returns=1)
        return ended[0]


def _run_elsewhere(folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.chdir(folder)  # relative paths are meant from where the run was started
    return function(*arguments)


def run_on_ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], address: str
) -> Iterator[tuple[Job, Result]]:
    """Each job with its result, as they end. Raises as `ray_cluster` and the jobs do."""
    if not jobs:
        return
    with ray_cluster(address) as tasks:
        running = {tasks.start(function, job): job for job in jobs}
        while running:
            ended = tasks.first_of(list(running))
            (result,) = tasks.results([ended])
            yield running.pop(ended), result


@contextmanager
def ray_cluster(address: str) -> Iterator[RayTasks]:
    """A cluster at an address; "local": one on this machine that ends with the block.

    Raises InvalidRequestError where Ray is missing or cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise InvalidRequestError("--ray needs Ray; install it with 'tidewright[ray]'.") from error
    where = None if address == "local" else address
    try:
        ray.init(where, log_to_driver=False, include_dashboard=False if where is None else None)
    except (ConnectionError, ValueError) as error:
        raise InvalidRequestError(
            f"no Ray cluster can be reached at {address!r} ({error}); give the address of one, or "
            "'local'."
        ) from error
    try:
        yield RayTasks(ray)
    finally:
        ray.shutdown()
