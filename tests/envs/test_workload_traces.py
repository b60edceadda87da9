"""Traces in memory and on disk, and the generator."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cluster import Request
from engine.errors import InvalidRequestError
from envs.traces import load_trace, read_trace
from envs.workload import (
    RequestType,
    Trace,
    WorkloadConfig,
    fit_lengths,
    generate,
    gusts,
    statistics,
)

NORMALISED = "timestamp_s,input_tokens,output_tokens\n0.000,4808,10\n0.052,3180,8\n7.500,1,1\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 23:59:59.9799600,4808,10\r\n"
    "2023-11-17 00:00:00.0319600,3180,8\r\n"
    "2023-11-17 00:00:07.4799600,1,1\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-12 01:00:00+00:00,4808,10\n"
    "2024-05-12 01:00:00.052000+00:00,3180,8\n"
    "2024-05-12 03:00:07.500000+02:00,1,1\n"
)


def simple_trace() -> Trace:
    return Trace(np.array([0.0, 1.0, 2.5, 9.0]), np.array([10, 20, 30, 40]), np.array([1, 2, 3, 4]))


# ---------------------------------------------------------------- files


BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,4808,10,4818,Conversation log\n"
    "5.01,GPT-4,0,0,0,Conversation log\n"
    "5.052,GPT-4,3180,8,3188,API log\n"
    "7,GPT-4,17,0,17,API log\n"
    "12.5,ChatGPT,1,1,2,Conversation log\n"
)
BURSTGPT_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "19440110.0,1722ac82,43,GPT-4,4808,10,4818,Conversation log\n"
    "19440110.052,d5983bf9,2,ChatGPT,3180,8,3188,Conversation log\n"
    '19440117.5,,2,"Chat,GPT",1,1,2,Conversation log\n'
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 4808, "output_length": 10, "hash_ids": [0, 1, 2]}\n'
    '{"input_length": 3180, "timestamp": 52, "output_length": 8}\n'
    '{"timestamp": 7.5e3, "input_length": 1, "output_length": 1, "hash_ids": []}\n'
)
FORMATS = {
    "own": (NORMALISED, 0),
    "azure": (AZURE, 0),
    "azure2024": (AZURE_2024, 0),
    "burstgpt": (BURSTGPT, 2),
    "burstgpt3": (BURSTGPT_3, 0),
    "mooncake": (MOONCAKE, 0),
    "bom": ("\ufeff" + AZURE, 0),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("zipped", [False, True])
def test_formats_are_recognised(tmp_path: Path, name: str, zipped: bool) -> None:
    text, failed = FORMATS[name]
    path = tmp_path / "trace"  # the name says nothing
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    reader = read_trace(path)
    requests = list(reader)
    assert [r.arrival_s for r in requests] == pytest.approx([0.0, 0.052, 7.5], abs=1e-6)
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(4808, 10), (3180, 8), (1, 1)]
    trace = load_trace(path)
    assert trace.requests() == requests
    assert trace.duration_s == pytest.approx(7.5, abs=1e-6)
    assert trace.num_failed == reader.num_failed == failed
    assert trace.window(0.0, 1.0).num_failed == failed  # a fact of the file


SHORT = NORMALISED[: NORMALISED.index("7.500")]
AZURE_SHORT = AZURE[: AZURE.index("2023-11-17 00:00:07")]
BURSTGPT_SHORT = BURSTGPT[: BURSTGPT.index("7,GPT-4")]
MOONCAKE_SHORT = MOONCAKE[: MOONCAKE.index('{"timestamp": 7.5e3')]


@pytest.mark.parametrize(
    ("before", "row", "named"),
    [
        (SHORT, "abc,1,1", ["line 4, column timestamp_s", "'abc'", "seconds"]),
        (SHORT, "nan,1,1", ["line 4, column timestamp_s", "'nan'"]),
        (SHORT, "inf,1,1", ["line 4, column timestamp_s", "'inf'"]),
        (SHORT, "0.01,1,1", ["line 4, column timestamp_s", "'0.01'", "not below the row before"]),
        (SHORT, "9,1.5,1", ["line 4, column input_tokens", "'1.5'", "whole number"]),
        (SHORT, "9,0,1", ["line 4, column input_tokens", "'0'", "at least 1"]),
        (SHORT, "9,1,-3", ["line 4, column output_tokens", "'-3'"]),
        (SHORT, "9,1,0", ["line 4, column output_tokens", "'0'"]),
        (SHORT, "9,1", ["line 4: 2 columns", "expected 3"]),
        (AZURE_SHORT, "2023-11-77 00:00:07.4,1,1", ["line 4, column TIMESTAMP", "2023-11-77"]),
        (AZURE_SHORT, "2023-11-17 00:00:0,1,1", ["line 4, column TIMESTAMP", "a time such as"]),
        (AZURE_SHORT, "2023-11-17 00:00:00,1,1", ["line 4, column TIMESTAMP", "not before"]),
        (AZURE_SHORT, "2023-11-17 00:00:07,x,1", ["line 4, column ContextTokens", "'x'"]),
        (BURSTGPT_SHORT, "4,GPT-4,1,1,2,API log", ["line 5, column Timestamp", "'4'"]),
        (BURSTGPT_SHORT, "6,GPT-4,0,5,5,API log", ["line 5, column Request tokens", "'0'"]),
        (BURSTGPT_SHORT, "6,GPT-4,-1,0,5,API log", ["line 5, column Request tokens", "'-1'"]),
        (BURSTGPT_SHORT, "6,GPT-4,7,,7,API log", ["column Response tokens", "''", "or 0 for a"]),
        (BURSTGPT_SHORT, "6,GPT-4,7,8", ["line 5: 4 columns", "expected 6"]),
        (MOONCAKE_SHORT, '{"timestamp": 60, "input_length": 7}', ["line 3", "output_length"]),
        (MOONCAKE_SHORT, '{"timestamp": 60, ', ["line 3", "expected a JSON object"]),
        (
            MOONCAKE_SHORT,
            '{"timestamp": 9, "input_length": 7, "output_length": 1}',
            ["line 3, column timestamp", "'9'", "milliseconds"],
        ),
        (
            MOONCAKE_SHORT,
            '{"timestamp": 99, "input_length": "7", "output_length": 1}',
            ["line 3, column input_length", "7", "whole number"],
        ),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, before: str, row: str, named: list[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(before + row + "\n")
    read = read_trace(path)
    assert [next(read).request_id, next(read).request_id] == ["r0", "r1"]  # streamed
    with pytest.raises(InvalidRequestError) as error:
        next(read)
    for part in ("bad.csv", *named):
        assert part in str(error.value), (part, str(error.value))
    with pytest.raises(InvalidRequestError):
        load_trace(path)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 10**7), st.integers(1, 10**6), st.integers(0, 10**5)),
        min_size=1,
        max_size=30,
    ),
    cut=st.tuples(st.integers(0, 20), st.integers(1, 20)),
)
def test_the_same_requests_in_every_format_and_cut(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int]],
    cut: tuple[int, int],
) -> None:
    """Milliseconds, prompt and output tokens; BurstGPT also has the rows of 0 output tokens."""
    rows = [(0, 1, 1), *sorted(rows)]
    kept = [row for row in rows if row[2]]
    start = datetime(2024, 5, 10, 23, 0, tzinfo=UTC)
    texts = {
        "own": ["timestamp_s,input_tokens,output_tokens"]
        + [f"{ms / 1000},{p},{o}" for ms, p, o in kept],
        "azure": ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        + [f"{start + timedelta(milliseconds=ms)},{p},{o}" for ms, p, o in kept],
        "burstgpt": ["Model,Response tokens,Request tokens,Timestamp"]
        + [f"m,{o},{p},{5 + ms / 1000}" for ms, p, o in rows],
        "mooncake": [
            f'{{"timestamp":{ms},"input_length":{p},"output_length":{o}}}' for ms, p, o in kept
        ],
    }
    first, stop = cut[0], cut[0] + cut[1]
    for name, lines in texts.items():
        path = tmp_path_factory.getbasetemp() / name
        path.write_text("\n".join(lines) + "\n")
        whole = load_trace(path)
        assert whole.arrival_s == pytest.approx([ms / 1000 for ms, _, _ in kept], abs=1e-6)
        assert whole.prompt_tokens.tolist() == [p for _, p, _ in kept]
        assert whole.output_tokens.tolist() == [o for _, _, o in kept]
        assert whole.num_failed == (len(rows) - len(kept)) * (name == "burstgpt")
        part = list(read_trace(path, rows=(first, stop)))
        assert [r.prompt_tokens for r in part] == [p for _, p, _ in kept[first:stop]]
        if part and first:
            origin = kept[first][0]
            times = [(ms - origin) / 1000 for ms, _, _ in kept[first:stop]]
            assert [r.arrival_s for r in part] == pytest.approx(times, abs=1e-6)


def test_slices_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(NORMALISED + "8,2,2\nnonsense\n")
    trace = load_trace(path, seconds=(0.05, 8.0))  # reading ends before the nonsense
    assert trace.arrival_s == pytest.approx([0.002, 7.45])
    assert trace.duration_s == 7.95
    assert load_trace(path, rows=(1, 3)).arrival_s == pytest.approx([0.0, 7.448])
    assert load_trace(path, rows=(0, 1)).arrival_s.tolist() == [0.0]
    with pytest.raises(InvalidRequestError, match="has no requests in seconds"):
        load_trace(path, seconds=(1.0, 2.0))
    with pytest.raises(InvalidRequestError, match=r"rows of a trace .* got \(3, 3\)"):
        load_trace(path, rows=(3, 3))
    with pytest.raises(InvalidRequestError, match="seconds or by rows"):
        read_trace(path, seconds=(0, 1), rows=(0, 1))


@pytest.mark.parametrize("content", ["", "a,b,c\n1,2,3\n", "timestamp_s,input_tokens\n"])
def test_unknown_headers(tmp_path: Path, content: str) -> None:
    path = tmp_path / "what.csv"
    path.write_text(content)
    with pytest.raises(InvalidRequestError, match=r"line 1: the header is .* expected 'timestamp"):
        load_trace(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nowhere\.csv cannot be read"):
        load_trace(tmp_path / "nowhere.csv")
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(NORMALISED.encode() * 50)[:60])
    with pytest.raises(InvalidRequestError, match="damaged"):
        load_trace(cut)
    empty = tmp_path / "empty.csv"
    empty.write_text("timestamp_s,input_tokens,output_tokens\n")
    with pytest.raises(InvalidRequestError, match="no requests"):
        load_trace(empty)


# ---------------------------------------------------------------- in memory


def test_window_by_hand() -> None:
    window = simple_trace().window(1.0, 1.5)
    assert window.arrival_s.tolist() == [0.0]  # 2.5 is its open end
    assert (window.duration_s, window.mean_rate_per_s) == (1.5, 1 / 1.5)
    assert simple_trace().window(1.0, 8.0).prompt_tokens.tolist() == [20, 30]
    assert simple_trace().requests("x")[1] == Request("x1", 1.0, 20, 2)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000)), min_size=1),
    factor=st.floats(0.001, 3.0),
    longest=st.integers(2, 5000),
)
def test_scaled_lengths_fit(lengths: list[tuple[int, int]], factor: float, longest: int) -> None:
    prompt, output = np.array(lengths).T
    trace = Trace(np.arange(float(len(lengths))), prompt, output)
    scaled = trace.scale_lengths(factor, longest)
    total = scaled.prompt_tokens + scaled.output_tokens
    assert (total <= longest).all()
    assert min(scaled.prompt_tokens.min(), scaled.output_tokens.min()) >= 1
    fits = (prompt * factor >= 1) & (output * factor >= 1) & (total < longest)
    assert (abs(scaled.prompt_tokens - prompt * factor)[fits] <= 0.5).all()


def test_too_long_pairs_shrink_in_proportion() -> None:
    prompt, output = fit_lengths(np.array([300.0, 5.0]), np.array([100.0, 7000.0]), 100)
    assert (prompt.tolist(), output.tolist()) == ([75, 1], [25, 99])


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.6])
def test_resample_keeps_rates_and_mix_over_time(factor: float) -> None:
    """Per window: the number within 5 standard deviations of `factor` times the source's (binomial
    when thinned, exact to one when drawn again), the mix within 5 of a bootstrap's."""
    config = WorkloadConfig(mean_rate_per_s=10.0, cycle_s=1200.0, cycle_amplitude=0.8)
    source = generate(config, 2400.0, np.random.default_rng(1))
    found = source.resample(factor * source.mean_rate_per_s, np.random.default_rng(2), 60.0)
    assert found.duration_s == source.duration_s
    assert (np.diff(found.arrival_s) >= 0).all()
    assert 0 <= found.arrival_s.min() <= found.arrival_s.max() < 2400.0
    longest = np.median(source.output_tokens)
    for start_s in range(0, 2400, 60):
        before, after = source.window(start_s, 60.0), found.window(start_s, 60.0)
        wanted = factor * len(before)
        slack = 5 * np.sqrt(wanted * (1 - factor)) if factor < 1 else 1.0
        assert abs(len(after) - wanted) <= slack, start_s
        assert set(after.output_tokens) <= set(before.output_tokens)
        share = np.mean(before.output_tokens > longest)
        again = np.mean(after.output_tokens > longest)
        assert abs(again - share) <= 5 * np.sqrt(share * (1 - share) / len(after)) + 1e-9
    assert len(np.unique(found.arrival_s)) == len(found)


def test_resample_never_compresses_time() -> None:
    """A burst at 1000 s is at 1000 s at every rate; thinned requests keep their very times."""
    burst = np.sort(np.random.default_rng(0).uniform(1000.0, 1010.0, 500))
    ones = np.ones(500, np.int64)
    source = Trace(burst, ones, ones, 3600.0)
    rng = np.random.default_rng(1)
    less = source.resample(0.4 * source.mean_rate_per_s, rng)
    assert set(less.arrival_s) <= set(burst)
    more = source.resample(8.0 * source.mean_rate_per_s, rng, window_s=10.0)
    assert 1000.0 <= more.arrival_s.min() < more.arrival_s.max() < 1010.0
    assert abs(len(more) - 4000) <= 1


def test_resample_is_determined_by_its_generator() -> None:
    source = generate(WorkloadConfig(), 600.0, np.random.default_rng(0))
    for rate_per_s in (2.0, 30.0):
        one, same, other = (
            source.resample(rate_per_s, np.random.default_rng(s)) for s in (1, 1, 2)
        )
        assert one.requests() == same.requests() != other.requests()


def test_thinned_poisson_is_poisson() -> None:
    """Index of dispersion of requests per second, 1 for Poisson: sd of its estimate sqrt(2/n)."""
    rng = np.random.default_rng(3)
    arrival_s = np.sort(rng.uniform(0.0, 7200.0, 7200 * 40))
    ones = np.ones(len(arrival_s), np.int64)
    thin = Trace(arrival_s, ones, ones, 7200.0).resample(8.0, rng)
    per_s = np.bincount(thin.arrival_s.astype(int), minlength=7200)
    assert abs(per_s.var() / per_s.mean() - 1.0) < 5 * np.sqrt(2 / 7200)


def test_requests_come_as_often_as_asked_and_a_little_later() -> None:
    trace = Trace(np.arange(4000.0), np.arange(4000), np.arange(4000) + 1, 4000.0)
    factors = np.repeat([0.0, 0.5, 1.0, 2.5], 1000)
    found = trace.repeat(factors, np.random.default_rng(0), within_s=0.5)
    times = np.bincount(found.prompt_tokens, minlength=4000)
    assert (times[:1000] == 0).all()
    assert (times[2000:3000] == 1).all()
    assert set(times[1000:2000]) == {0, 1}
    assert set(times[3000:]) == {2, 3}
    assert times[1000:2000].mean() == pytest.approx(0.5, abs=0.05)
    assert times[3000:].mean() == pytest.approx(2.5, abs=0.05)
    assert (np.diff(found.arrival_s) >= 0).all()
    late_s = found.arrival_s - found.prompt_tokens
    assert ((late_s >= 0) & (late_s <= 0.5)).all()
    assert found.output_tokens[-1] == 4000


def test_gusts_move_the_rate_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    trace = generate(
        WorkloadConfig(cycle_amplitude=0.0, level_sigma=0.0, burst_factor=1.0), 3600, rng
    )
    still = gusts(WorkloadConfig(level_sigma=0.0, burst_factor=1.0), trace, rng)
    np.testing.assert_array_equal(still.arrival_s, trace.arrival_s)
    moved = gusts(WorkloadConfig(level_sigma=0.5, regime_s=300.0, burst_factor=1.0), trace, rng)
    ratio = statistics(moved).idc_60s / statistics(trace).idc_60s
    assert ratio > 3
    assert set(moved.prompt_tokens) <= set(trace.prompt_tokens)
    assert len(gusts(WorkloadConfig(), trace.window(0.0, 0.0), rng)) == 0


def test_resample_of_nothing() -> None:
    with pytest.raises(InvalidRequestError):
        simple_trace().window(3.0, 1.0).resample(1.0, np.random.default_rng(0))


# ---------------------------------------------------------------- the generator


def test_generator_is_deterministic_and_sorted() -> None:
    config = WorkloadConfig(max_tokens=512)
    one, same, other = (generate(config, 300.0, np.random.default_rng(s)) for s in (1, 1, 2))
    assert one.requests() == same.requests() != other.requests()
    assert (np.diff(one.arrival_s) >= 0).all()
    assert one.arrival_s.max() <= 300.0
    assert (one.prompt_tokens + one.output_tokens <= 512).all()


def test_generator_without_movement_is_poisson_with_lognormal_lengths() -> None:
    flat = WorkloadConfig(
        types=(RequestType("only", 100, 50, 0.5, 0.6),),
        mean_rate_per_s=20.0,
        cycle_amplitude=0.0,
        level_sigma=0.0,
        burst_factor=1.0,
    )
    trace = generate(flat, 6000.0, np.random.default_rng(3))
    found = statistics(trace)
    assert trace.mean_rate_per_s == pytest.approx(20.0, rel=0.02)
    assert found.iat_cv == pytest.approx(1.0, abs=0.03)
    assert found.idc_60s == pytest.approx(1.0, abs=0.5)
    assert found.prompt_tokens[0] == pytest.approx(100, rel=0.02)
    p90 = 50 * np.exp(0.6 * 1.2816)  # the standard normal's 90th percentile
    assert found.output_tokens[1] == pytest.approx(p90, rel=0.03)


def test_generator_moves_rates_and_mix() -> None:
    trace = generate(WorkloadConfig(), 6 * 3600.0, np.random.default_rng(0))
    assert statistics(trace).idc_60s > 20  # far from Poisson
    long_output = trace.output_tokens > 150
    shares = [long_output[trace.arrival_s // 600 == w].mean() for w in range(36)]
    assert np.std(shares) > 0.1


def test_statistics_by_hand() -> None:
    arrival_s = np.array([0.0, 10.0, 20.0, 70.0, 119.0])
    trace = Trace(arrival_s, np.arange(1, 6), np.arange(1, 6), 120.0)
    found = statistics(trace)
    assert (found.mean_per_min, found.peak_per_min) == (2.5, 3.0)
    assert found.idc_60s == pytest.approx(0.25 / 2.5)
    gaps = np.array([10, 10, 50, 49])
    assert found.iat_cv == pytest.approx(gaps.std() / gaps.mean())
    assert found.prompt_tokens[0] == 3.0
    with pytest.raises(InvalidRequestError):
        statistics(trace.window(0.0, 15.0))
