"""A heap that has settled: what lived is set apart, and what comes later is still collected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from controller.heap import YOUNG_OBJECTS, settle_heap


class Ring:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


def test_old_objects_are_set_apart_and_young_ones_are_collected_when_there_are_many(
    restored: None,
) -> None:
    settle_heap()
    assert gc.get_freeze_count() > YOUNG_OBJECTS
    ring = weakref.ref(Ring())
    kept = [[] for _ in range(YOUNG_OBJECTS // 2)]
    assert ring() is not None
    kept += [[] for _ in range(YOUNG_OBJECTS)]
    assert ring() is None
    assert len(kept) == YOUNG_OBJECTS // 2 + YOUNG_OBJECTS


def test_garbage_made_while_it_lived_is_collected_when_the_heap_settles_again(
    restored: None,
) -> None:
    ring = Ring()
    settle_heap()
    gone = weakref.ref(ring)
    del ring
    gc.collect()
    assert gone() is not None
    settle_heap()
    assert gone() is None
