import torch

from engine.kv_cache import KvCache


def make_cache() -> KvCache:
    return KvCache(
        num_layers=3, num_blocks=5, block_size=4, num_kv_heads=2, head_dim=8,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip


def test_write_puts_tokens_in_their_slots() -> None:
    cache = make_cache()
    keys, values = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    cache.write(1, torch.tensor([2, 7, 19]), keys, values)
    assert torch.equal(cache.keys(1)[[2, 7, 19]], keys)
    assert torch.equal(cache.values(1)[[2, 7, 19]], values)
    assert torch.equal(cache.data[0, 1, 4, 3], keys[2])  # slot 19 = block 4, offset 3
    assert int((cache.data != 0).any(-1).sum()) == 2 * 3 * 2  # nothing else was touched


def test_views_share_the_cache() -> None:
    cache = make_cache()
    assert cache.keys(2).shape == (20, 2, 8)
    cache.keys(2)[0] = 1.0
    assert cache.data[0, 2, 0, 0].eq(1).all()
    assert cache.nbytes == 2 * 3 * 5 * 4 * 2 * 8 * 4


def test_blocks_move_to_another_cache_byte_for_byte() -> None:
    source, target = make_cache(), make_cache()
    source.data.normal_(generator=torch.Generator().manual_seed(0))
    part = source.read_blocks([4, 1], layers=(1, 3), heads=(1, 2))
    assert part.shape == (2, 2, 2, 4, 1, 8)
    assert part.is_contiguous()
    assert torch.equal(part[1, 0, 1, :, 0], source.data[1, 1, 1, :, 1])
    target.write_blocks([0, 3], layers=(0, 2), heads=(0, 1), data=part)
    assert torch.equal(target.read_blocks([0, 3], (0, 2), (0, 1)), part)
    assert torch.equal(target.data[0, 1, 3, :, 0], source.data[0, 2, 1, :, 1])
    assert not target.data[:, 2].any()
    assert not target.data[:, :, :, :, 1].any()
    assert not target.data[:, :, [1, 2, 4]].any()


def test_a_copy_is_read_not_a_view() -> None:
    cache = make_cache()
    part = cache.read_blocks([0], (0, 3), (0, 2))
    cache.data.fill_(1.0)
    assert not part.any()


def test_gather_reuses_one_buffer_that_grows() -> None:
    cache = make_cache()
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    for blocks in ([3], [4, 0, 4, 1], [2, 3]):
        keys, values = cache.gather(2, torch.tensor(blocks))
        slots = [b * 4 + i for b in blocks for i in range(4)]
        assert torch.equal(keys, cache.keys(2)[slots])
        assert torch.equal(values, cache.values(2)[slots])
