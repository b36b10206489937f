"""The part of a hit that is loaded is the one with which the prompt is computed soonest."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.messages import TIER_DISK, TIER_HOST, TIER_REMOTE
from cachetier_connector.break_even import (
    LOADS_REMEMBERED,
    MARGIN_S,
    MARGIN_SHARE,
    NEWS_INTERVAL_S,
    PATIENCE_S,
    PATIENCE_UNMEASURED_S,
    BreakEven,
    Choice,
    Hit,
    LoadRate,
    choose,
)
from cachetier_connector.prefill_rate import PrefillModel, PrefillWork

CHUNK = 64
H200 = PrefillModel(22e-6, 9e-10)  # an 8B model: 32k tokens in 1.2 s
CHUNK_BYTES = 8 << 20
FAST = 4e5  # tokens a second from host memory: 52 GB/s


def hit_on(host: int, disk: int, bytes_per_s: float | None, *, computed: int = 0, elapsed_s: float = 0.0) -> Hit:
    """Return a hit of chunks in host memory and then on a disk that nobody else uses."""
    ready = [] if bytes_per_s is None else [(number + 1) * CHUNK_BYTES / bytes_per_s for number in range(disk)]
    return Hit(
        num_tokens=(host + disk) * CHUNK + 100,
        num_computed=computed,
        chunk_tokens=CHUNK,
        tiers=bytes([TIER_HOST] * host + [TIER_DISK] * disk),
        ready_in_s=ready,
        elapsed_s=elapsed_s,
    )


def seconds_with(hit: Hit, num_chunks: int, prefill: PrefillModel, load_tokens_per_s: float) -> float:
    """Return when the prompt is computed if `num_chunks` are loaded, written down as plainly as can be."""
    end = hit.end_of(num_chunks)
    if end <= hit.num_computed:
        return prefill.seconds(hit.num_computed, hit.num_tokens)
    on_disk = hit.tiers[:num_chunks].count(TIER_DISK)
    wait_s = max([0.0, *(ready - hit.elapsed_s for ready in hit.ready_in_s[:on_disk])])
    copy_s = (end - hit.num_computed) / load_tokens_per_s
    return max(wait_s, copy_s) + prefill.seconds(end, hit.num_tokens)


def test_a_disk_that_is_slower_than_the_prefill_is_left_alone():
    """The bench's row: 32k tokens, 4 GiB, at 1.7 GB/s take 2.4 s; computing them takes 1.2 s."""
    assert choose(hit_on(0, 511, 1.7e9), H200, FAST).num_chunks == 0


def test_a_disk_that_is_faster_than_the_prefill_is_read():
    assert choose(hit_on(0, 511, 7e9), H200, FAST).num_chunks == 511


def test_what_is_in_memory_is_loaded_and_what_is_on_a_slow_disk_behind_it_is_not():
    assert choose(hit_on(200, 311, 0.2e9), H200, FAST) == Choice(200, None), "nothing is waited for"
    copying_s = 200 * CHUNK / FAST
    assert choose(hit_on(200, 311, 1.7e9), H200, FAST).num_chunks == 200 + int(copying_s * 1.7e9 / CHUNK_BYTES) + 1


@pytest.mark.parametrize("bytes_per_s", [None, 0.2e9, 1.7e9, 7e9])
@pytest.mark.parametrize("host", [0, 200])
def test_what_comes_from_a_remote_store_is_decided_about_like_what_comes_from_disk(host, bytes_per_s):
    hit = hit_on(host, 311, bytes_per_s)
    for number_remote in (1, 100, 311):
        tiers = hit.tiers[:-number_remote] + bytes([TIER_REMOTE] * number_remote)
        for prefill in (None, H200):
            assert choose(dataclasses.replace(hit, tiers=tiers), prefill, FAST) == choose(hit, prefill, FAST)


def test_what_was_read_while_the_request_waited_is_loaded():
    slow = hit_on(0, 511, 1.7e9, elapsed_s=1.0)
    assert choose(slow, H200, FAST).num_chunks == pytest.approx(1.0 * 1.7e9 / CHUNK_BYTES, rel=0.1)
    assert choose(hit_on(0, 511, 1.7e9, elapsed_s=2.55), H200, FAST).num_chunks == 511


def test_a_hit_can_be_cut_at_any_chunk():
    found = {choose(hit_on(0, 511, 1.7e9, elapsed_s=n / 100), H200, FAST).num_chunks for n in range(240)}
    assert len(found) > 50


def test_reads_that_were_asked_for_before_are_waited_for_too():
    alone = hit_on(0, 511, 7e9)
    queued = dataclasses.replace(alone, ready_in_s=[5 + ready for ready in alone.ready_in_s])
    assert choose(alone, H200, FAST).num_chunks == 511
    assert choose(queued, H200, FAST).num_chunks == 0


def test_little_to_gain_is_no_reason_to_cut():
    near = hit_on(0, 511, 511 * CHUNK_BYTES / (1.02 * H200.seconds(0, 511 * CHUNK)))
    assert choose(near, H200, FAST).num_chunks == 511
    short = hit_on(0, 4, 1e9)  # 34 ms to read, 6 ms to compute: cut; and with a third of it in the margin: not
    assert choose(short, H200, FAST).num_chunks == 0
    assert choose(hit_on(0, 4, 2.5e9), H200, FAST).num_chunks == 4


def test_what_is_not_known_speaks_for_loading():
    assert choose(hit_on(0, 511, 1e6), None, None).num_chunks == 511
    assert choose(hit_on(0, 511, None), H200, None).num_chunks == 511
    assert choose(hit_on(511, 0, None), H200, None).num_chunks == 511


def test_a_load_from_disk_has_patience_for_so_long_as_it_should_take_and_not_much_longer():
    assert choose(hit_on(0, 511, 1e6), None, None).patience_s == PATIENCE_UNMEASURED_S
    assert choose(hit_on(511, 0, None), None, None).patience_s is None
    unknown = choose(hit_on(0, 511, None), H200, None).patience_s
    assert PATIENCE_S < unknown < PATIENCE_S + 0.5 * H200.seconds(0, 511 * CHUNK)
    hit = hit_on(0, 511, 7e9)
    assert hit.ready_in_s[-1] < choose(hit, H200, FAST).patience_s < 2 * hit.ready_in_s[-1] + PATIENCE_S


def test_memory_that_is_slower_than_computing_is_left_alone_too():
    assert choose(hit_on(511, 0, None), H200, 1e3).num_chunks == 0


def test_what_the_engine_has_itself_counts_for_nothing():
    most = hit_on(0, 511, 1.7e9, computed=500 * CHUNK)
    assert choose(most, H200, FAST).num_chunks == 0, "the disk reads what the engine has before what it has not"
    assert choose(hit_on(511, 0, None, computed=500 * CHUNK + 7), H200, FAST).num_chunks == 511
    assert choose(hit_on(5, 0, None, computed=5 * CHUNK), H200, FAST).num_chunks == 5


hits = st.builds(
    lambda tiers, rest, computed, gaps, elapsed_s: Hit(
        num_tokens=len(tiers) * CHUNK + rest,
        num_computed=min(computed, len(tiers) * CHUNK - 2),
        chunk_tokens=CHUNK,
        tiers=bytes(tiers),
        ready_in_s=list(itertools.accumulate(itertools.islice(itertools.cycle(gaps), tiers.count(TIER_DISK)))),
        elapsed_s=elapsed_s,
    ),
    tiers=st.lists(st.sampled_from([TIER_HOST, TIER_DISK]), min_size=1, max_size=60),
    rest=st.integers(0, 5000),
    computed=st.integers(0, 2000),
    gaps=st.lists(st.floats(1e-5, 0.1), min_size=1, max_size=5),
    elapsed_s=st.floats(0, 1),
)
models = st.builds(PrefillModel, st.floats(1e-6, 1e-3), st.floats(0, 1e-7))
rates = st.floats(1e3, 1e7)


@given(hits, models, rates)
def test_no_other_part_is_better_by_more_than_the_margin(hit, prefill, rate):
    num_chunks = choose(hit, prefill, rate).num_chunks
    totals = [seconds_with(hit, number, prefill, rate) for number in range(len(hit.tiers) + 1)]
    if num_chunks == len(hit.tiers):
        assert totals[num_chunks] - min(totals) <= max(MARGIN_S, MARGIN_SHARE * totals[num_chunks]) + 1e-9
    else:
        assert totals[num_chunks] == pytest.approx(min(totals))
        assert totals[-1] - min(totals) > max(MARGIN_S, MARGIN_SHARE * totals[-1]) - 1e-9


@given(hits, models, rates, st.floats(1, 100))
def test_a_faster_disk_never_shrinks_what_is_loaded(hit, prefill, rate, faster):
    slow = dataclasses.replace(hit, elapsed_s=0.0)
    fast = dataclasses.replace(slow, ready_in_s=[ready / faster for ready in hit.ready_in_s])
    assert choose(fast, prefill, rate).num_chunks >= choose(slow, prefill, rate).num_chunks


@given(hits, models, rates, st.floats(0, 10))
def test_waiting_longer_before_the_decision_never_shrinks_what_is_loaded(hit, prefill, rate, more_s):
    later = dataclasses.replace(hit, elapsed_s=hit.elapsed_s + more_s)
    assert choose(later, prefill, rate).num_chunks >= choose(hit, prefill, rate).num_chunks


def test_the_load_rate_is_that_of_the_best_of_the_latest_loads():
    rate = LoadRate()
    assert rate.tokens_per_s is None
    rate.learn(10, 1e-6)  # too short to tell anything
    assert rate.tokens_per_s is None
    rate.learn(1000, 0.01)
    rate.learn(1000, 1.0)
    assert rate.tokens_per_s == pytest.approx(1e5)
    for _ in range(LOADS_REMEMBERED):
        rate.learn(1000, 0.5)
    assert rate.tokens_per_s == pytest.approx(2000)


def measured(seconds: float) -> BreakEven:
    """Return what an engine knows that computed 32k tokens in two steps."""
    rates = BreakEven()
    for start in (0, 16_384):
        rates.prefill.learn(PrefillWork(16_384, (start + 8192) * 16_384), seconds / 2)
    return rates


def test_a_load_rate_by_which_nothing_is_loaded_is_doubted_until_it_is_measured_again():
    rates = measured(1.0)
    for _ in range(LOADS_REMEMBERED):
        rates.load.learn(1000, 10.0)
    chosen = [rates.choose(hit_on(511, 0, None)).num_chunks for _ in range(LOADS_REMEMBERED + 1)]
    assert chosen == [0] * LOADS_REMEMBERED + [511]


def test_a_slow_disk_is_no_reason_to_doubt_memory():
    rates = measured(1.0)
    rates.load.learn(1000, 0.01)
    for _ in range(20):
        assert rates.choose(hit_on(100, 411, 1e8)).num_chunks == 100
    assert rates.load.tokens_per_s == pytest.approx(1e5)


def test_rates_are_news_once_in_a_while():
    assert BreakEven().news(1000, 0.0) is None
    rates = measured(2.0)
    rates.load.learn(1000, 0.01)
    assert rates.news(32_768, 100.0) == pytest.approx((16_384, 1e5), rel=0.01)
    assert rates.news(32_768, 100.0 + NEWS_INTERVAL_S / 2) is None
    assert rates.news(32_768, 100.0 + NEWS_INTERVAL_S) is not None
