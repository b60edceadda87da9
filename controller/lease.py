"""A lease: of several controllers of one engine, one acts.

Whoever holds it has an epoch that only rises, its term. A holder renews it and stops acting when it
could not for so long that another may have it (`check`, on the holder's own monotonic clock, which
goes on while the process is stopped). A holder that wakes up between that check and its call is
refused by the engine, which knows of the higher term: `engine.terms`. Where leases are kept is
behind `LeaseStore`: a file on one machine (`controller.lease_file`), or for several etcd
(`controller.lease_etcd`) or Kubernetes (`controller.lease_kubernetes`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from engine.errors import StaleEpochError, TidewrightError, UnavailableError

logger = logging.getLogger(__name__)
SAFETY = 0.9  # of the lease that its holder counts on: clocks need not run alike
RENEWALS = 3  # tries per lease


class LeaseStore(Protocol):
    """Where a lease of `ttl_s` seconds is kept. All calls raise UnavailableError."""

    ttl_s: float

    @property
    def where(self) -> str:
        """For people."""
        ...

    def acquire(self, above: int) -> int:
        """Take it if it is free, with an epoch above all before and above `above`; 0: it is not."""
        ...

    def renew(self) -> bool:
        """For another `ttl_s`; False: it is lost."""
        ...

    def release(self) -> None:
        """Let the next one have it at once."""
        ...

    def holder(self) -> str:
        """Who has it; empty when nobody or not known."""
        ...


class Lease:
    """One controller's side of it. `term` is that of the last time it was held, 0 before."""

    def __init__(
        self, store: LeaseStore, clock: Callable[[], float] = time.monotonic, renews: bool = True
    ) -> None:
        self.store, self._clock, self._renews = store, clock, renews
        self.term = 0
        self.lost = threading.Event()
        self.lost.set()
        self._valid_until_s = 0.0
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, above: Callable[[], int] = int) -> bool:
        """One try; `above` gives the highest term that the engine knows of.

        Raises UnavailableError when store or engine do not answer.
        """
        asked_s = self._clock()
        term = self.store.acquire(above())
        if not term:
            return False
        self.term = term
        self._count_on(asked_s)
        self.lost.clear()
        if self._renews:
            self._halt = threading.Event()
            arguments = (self._halt,)
            self._thread = threading.Thread(
                target=self._renew_on, args=arguments, name="lease", daemon=True
            )
            self._thread.start()
        return True

    def _count_on(self, asked_s: float) -> None:
        self._valid_until_s = asked_s + SAFETY * self.store.ttl_s

    @property
    def is_held(self) -> bool:
        return not self.lost.is_set() and self._clock() < self._valid_until_s

    def check(self) -> None:
        """Raises StaleEpochError when another may have taken over."""
        if not self.is_held:
            raise StaleEpochError(
                f"this controller does not hold the lease ({self.store.where}) any more; another "
                "may act, so it does not."
            )

    def renew(self) -> None:
        """One try. `lost` is set when it is over, or when nobody could be asked for too long."""
        asked_s = self._clock()
        if asked_s >= self._valid_until_s:
            self.lost.set()  # whatever the store says now: somebody may have had it since
            return
        try:
            if self.store.renew():
                self._count_on(asked_s)
            else:
                self.lost.set()
        except TidewrightError as error:
            logger.warning("the lease was not renewed: %s", error)
            if self._clock() >= self._valid_until_s:
                self.lost.set()

    def _renew_on(self, halt: threading.Event) -> None:
        while not halt.wait(self.store.ttl_s / RENEWALS):
            self.renew()
            if self.lost.is_set():
                logger.error("the lease (%s) is lost", self.store.where)
                return

    def release(self) -> None:
        """Stop renewing, and let the next one have it if it is still ours."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join(self.store.ttl_s)
            self._thread = None
        was_held = self.is_held
        self.lost.set()
        if was_held:
            try:
                self.store.release()
            except UnavailableError as error:
                logger.warning("the lease was not released, it will expire: %s", error)
