"""What a request may ask for in `kv_transfer_params`."""

import pytest

from cachetier_connector.requests import wishes_of


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"cachetier": {}}, {"cachetier": None}])
def test_a_request_that_says_nothing_loads_and_stores(params):
    assert wishes_of(params) == (True, True, "")


def test_a_request_can_refuse_either():
    assert wishes_of({"cachetier": {"load": False}}) == (False, True, "")
    assert wishes_of({"cachetier": {"store": False}}) == (True, False, "")


def test_a_mistake_is_named_and_what_is_clear_is_kept():
    load, store, complaint = wishes_of({"cachetier": {"store": False, "lod": False}})
    assert (load, store) == (True, False)
    assert "lod" in complaint
    assert "load, store" in complaint
    assert "not an object" in wishes_of({"cachetier": "off"})[2]
