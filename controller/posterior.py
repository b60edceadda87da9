"""P(type | prompt length, class, client): what is known of a request's type when it arrives.

Each level is counted from finished requests and backs off to the one before: prompt length, class,
client of that class. A class or client that has not been seen changes nothing, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controller.workload import Floats, PromptPosterior
from engine.cluster import LABEL_CHARS, WorkloadTyping

MAX_CLASSES, MAX_CLIENTS = 64, 1024  # the least recently seen are forgotten
SMOOTHING = 1.0  # requests that the level before counts as
MEMORY_REQUESTS = 1000.0  # of its own, that a class or client remembers


class LabelCounts:
    """Finished requests [bucket][type] of each label, for the `capacity` last seen. A label's
    counts decay by `1 - 1/memory_requests` with each request of its own. None: no label."""

    def __init__(
        self, capacity: int, memory_requests: float = MEMORY_REQUESTS, smoothing: float = SMOOTHING
    ) -> None:
        assert capacity > 0, capacity
        self._capacity, self._smoothing = capacity, smoothing
        self._decay = 1.0 - 1.0 / memory_requests
        self._tables: OrderedDict[Hashable, Floats] = OrderedDict()  # least recently seen first

    def __len__(self) -> int:
        return len(self._tables)

    def refine(
        self, rows: Floats, buckets: NDArray[np.intp], labels: Sequence[Hashable | None]
    ) -> None:
        """Shrink each label's counts in its request's bucket towards `rows` [N, J], in place; rows
        for which there are no counts stay as they are."""
        counts = np.zeros_like(rows)
        for i, label in enumerate(labels):
            table = self._tables.get(label)
            if table is not None:
                counts[i] = table[buckets[i]]
        seen = counts.any(axis=1)
        weight = counts[seen] + self._smoothing * rows[seen]
        rows[seen] = weight / weight.sum(axis=1, keepdims=True)

    def observe(
        self,
        shape: tuple[int, ...],
        buckets: NDArray[np.intp],
        types: NDArray[np.int64],
        labels: Sequence[Hashable | None],
    ) -> None:
        """Count finished requests, one after another; tables have `shape`, buckets by types."""
        for bucket, kind, label in zip(buckets.tolist(), types.tolist(), labels, strict=True):
            if label is None:
                continue
            table = self._tables.get(label)
            if table is None:
                table = self._tables[label] = np.zeros(shape)
                if len(self._tables) > self._capacity:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(label)
            table *= self._decay
            table[bucket, kind] += 1.0


def _labels(
    classes: Sequence[str], clients: Sequence[str]
) -> tuple[list[Hashable | None], list[Hashable | None]]:
    """Of the two levels; empty strings are no labels. Anyone may send any name, of any length."""
    classes = [name[:LABEL_CHARS] for name in classes]
    clients = [name[:LABEL_CHARS] for name in clients]
    pairs = zip(classes, clients, strict=True)
    return [name or None for name in classes], [pair if pair[1] else None for pair in pairs]


class TypePosterior(PromptPosterior):
    """`PromptPosterior`, refined by the request's class, and by its client within that class.

    `matrix`, `table` and `mixing` are of the prompt's length alone, as the router has it.
    """

    def __init__(
        self,
        typing: WorkloadTyping,
        max_classes: int = MAX_CLASSES,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        self._capacities = max_classes, max_clients
        super().__init__(typing)

    def reset(self) -> None:
        super().reset()
        self._levels = tuple(LabelCounts(capacity) for capacity in self._capacities)

    def rows_given(
        self, prompt_tokens: Sequence[int], classes: Sequence[str], clients: Sequence[str]
    ) -> Floats:
        """[N, J] P(type | prompt, class, client) of arrivals; an empty string is unknown."""
        buckets = self.buckets(prompt_tokens)
        rows = self.matrix[buckets]
        if any(classes) or any(clients):
            for level, labels in zip(self._levels, _labels(classes, clients), strict=True):
                level.refine(rows, buckets, labels)
        return rows

    def observe_given(
        self,
        prompt_tokens: ArrayLike,
        types: NDArray[np.int64],
        classes: Sequence[str],
        clients: Sequence[str],
    ) -> None:
        """Count finished requests of known type, with their class and client."""
        self.observe(prompt_tokens, types)
        if any(classes) or any(clients):
            buckets = self.buckets(prompt_tokens)
            for level, labels in zip(self._levels, _labels(classes, clients), strict=True):
                level.observe(self.matrix.shape, buckets, types, labels)
