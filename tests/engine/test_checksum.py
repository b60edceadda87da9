"""The checksum of what moves between workers, against its definition in whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checksum import checksum


def by_definition(data: bytes) -> int:
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    return sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**64


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@given(st.binary(max_size=200))
def test_it_is_what_it_says(data: bytes) -> None:
    assert checksum(as_tensor(data)) == by_definition(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_reads_the_bytes_of_any_number_format(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(tensor) == by_definition(tensor.view(torch.uint8).numpy().tobytes())


@given(st.binary(min_size=1, max_size=200), st.data())
def test_no_change_of_one_byte_goes_unseen(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data) - 1))
    other = draw.draw(st.integers(0, 255).filter(lambda value: value != data[at]))
    changed = data[:at] + bytes([other]) + data[at + 1 :]
    assert checksum(as_tensor(changed)) != checksum(as_tensor(data))


def test_words_that_change_places_are_seen() -> None:
    words = torch.arange(64)
    assert checksum(words) != checksum(words.flip(0))
