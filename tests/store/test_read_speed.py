"""The disk's speed: what all threads together get, the latest counting most, stalls included."""

import pytest

from cachetier.store.read_speed import STALE_S, WINDOW_S, ReadSpeed

MB = 10**6


def read(speed: ReadSpeed, start: float, seconds: float, size: int = MB) -> float:
    speed.begin(size, start)
    speed.end(size, start + seconds, is_read=True)
    return start + seconds


def test_nothing_is_known_before_the_first_read_ends():
    speed = ReadSpeed(1)
    assert speed.bytes_per_s(0) is None
    assert speed.is_stale(0)
    speed.begin(MB, 0)
    assert speed.bytes_per_s(WINDOW_S / 2) is None
    assert not speed.is_stale(100)


def test_reads_at_the_same_time_add_up():
    speed = ReadSpeed(4)
    for _ in range(4):
        speed.begin(MB, 10)
    for _ in range(4):
        speed.end(MB, 11, is_read=True)
    assert speed.bytes_per_s(11) == pytest.approx(4 * MB)


def test_time_without_reads_does_not_count():
    speed = ReadSpeed(1)
    for start in (0, 10, 100):
        now = read(speed, start, 0.1)
    assert speed.bytes_per_s(now + 50) == pytest.approx(10 * MB)


def test_a_failed_read_says_nothing():
    speed = ReadSpeed(1)
    read(speed, 0, 0.1)
    speed.begin(MB, 5)
    speed.end(MB, 9, is_read=False)
    assert speed.bytes_per_s(9) == pytest.approx(10 * MB)


@pytest.mark.parametrize(("before_s", "after_s"), [(0.1, 10), (10, 0.1)])
def test_a_disk_that_became_another_is_known_after_a_few_reads(before_s, after_s):
    speed, now = ReadSpeed(1), 0.0
    for _ in range(10):
        now = read(speed, now, before_s)
    for _ in range(8):
        now = read(speed, now, after_s)
    assert speed.bytes_per_s(now) == pytest.approx(MB / after_s, rel=0.1)


def test_a_read_that_takes_long_lowers_the_speed_before_it_ends():
    speed = ReadSpeed(1)
    now = read(speed, 0, 0.1)
    speed.begin(MB, now)
    assert speed.bytes_per_s(now + WINDOW_S / 2) == pytest.approx(10 * MB)
    assert speed.bytes_per_s(now + 5) == pytest.approx(MB / 5)
    unknown = ReadSpeed(4)
    unknown.begin(MB, 0)
    assert unknown.bytes_per_s(2) == pytest.approx(MB / 2)


def test_a_measurement_is_stale_when_nothing_was_read_since():
    speed = ReadSpeed(1)
    now = read(speed, 0, 0.1)
    assert not speed.is_stale(now + STALE_S / 2)
    assert speed.is_stale(now + STALE_S)
