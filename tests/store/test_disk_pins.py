"""Pins on disk: a key is either kept or leaving, never both."""

from cachetier.store import disk_pins
from cachetier.store.disk_pins import DiskPins
from tests.store.chunks import key_of


def test_a_pinned_key_is_carried_over_as_long_as_anybody_pins_it():
    pins = DiskPins()
    assert pins.pin(key_of(1))
    assert pins.pin(key_of(1))
    pins.unpin(key_of(1))
    assert pins.is_pinned(key_of(1))
    pins.unpin(key_of(1))
    assert not pins.is_pinned(key_of(1))
    assert pins.num_pinned == 0


def test_a_key_that_is_leaving_cannot_be_pinned_until_the_reclaiming_is_over():
    pins = DiskPins()
    assert not pins.is_pinned(key_of(1))
    assert not pins.pin(key_of(1))
    assert pins.take_leaving() == {key_of(1)}
    assert pins.take_leaving() == set()
    assert pins.pin(key_of(1))


def test_a_read_keeps_a_key_once_and_reads_are_remembered_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(disk_pins, "HOT_MAX", 3)
    pins = DiskPins()
    for number in range(4):
        pins.touch(key_of(number))
    assert not pins.is_hot(key_of(0))
    assert pins.is_hot(key_of(3))
    assert not pins.is_hot(key_of(3))
