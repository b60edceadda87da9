"""What options of an engine become: facts of the cluster, flags of the command line."""

import argparse
from pathlib import Path

import pytest

from engine.build import build_cluster_spec
from engine.cluster import ParallelConfig
from engine.config import EngineConfig, add_arguments, parse_config
from engine.errors import InvalidRequestError
from engine.shards import num_kv_blocks, rank_weight_bytes


def config_of(*argv: str) -> EngineConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser, EngineConfig)
    return parse_config(parser, EngineConfig, list(argv))


def test_gpu_memory_utilization_is_a_share_of_the_device(tiny_model_dir: Path) -> None:
    whole = build_cluster_spec(config_of("--device-memory-mb", "40"), tiny_model_dir)
    part = build_cluster_spec(
        config_of("--device-memory-mb", "40", "--gpu-memory-utilization", "0.75"), tiny_model_dir
    )
    assert (whole.device_memory_bytes, part.device_memory_bytes) == (40_000_000, 30_000_000)
    one = ParallelConfig(1, 1)
    block_bytes = whole.block_size * whole.model.kv_bytes_per_token(
        whole.model.num_layers, whole.model.num_kv_heads
    )
    room = 30_000_000 - rank_weight_bytes(part.model, one, 0)
    assert num_kv_blocks(part, one) == room // block_bytes < num_kv_blocks(whole, one)


@pytest.mark.parametrize("share", ["0", "1.01"])
def test_a_share_outside_its_range_is_refused(share: str) -> None:
    with pytest.raises(InvalidRequestError, match="gpu_memory_utilization"):
        config_of("--gpu-memory-utilization", share)


def test_switches_have_an_opposite() -> None:
    assert config_of().enable_prefix_caching
    assert config_of("--enable-prefix-caching").enable_prefix_caching
    assert not config_of("--no-enable-prefix-caching").enable_prefix_caching
