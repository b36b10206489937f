"""What a request may ask for in `kv_transfer_params`."""

import pytest

from cachetier_connector.wishes import Wishes, wishes_of


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"cachetier": {}}, {"cachetier": None}])
def test_a_request_that_says_nothing_loads_and_stores_and_leaves_the_rest_to_the_configuration(params):
    assert wishes_of(params) == Wishes(load=True, store=True, blend=None, select=None, budget=None, document="")


def test_every_wish_is_heard():
    assert wishes_of({"cachetier": {"load": False}}) == Wishes(load=False)
    assert wishes_of({"cachetier": {"store": False}}) == Wishes(store=False)
    given = {"blend": True, "select": "query", "budget": 0.25}
    assert wishes_of({"cachetier": given}) == Wishes(blend=True, select="query", budget=0.25)
    assert wishes_of({"cachetier": {"document": "a.txt"}}) == Wishes(document="a.txt")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("lod", False, "load, store, blend, select, budget, prefill, document"),
        ("load", "no", "true or false"),
        ("blend", 1, "true or false"),
        ("select", "best", "none, link, query"),
        ("budget", 1.5, "between 0 and 1"),
        ("budget", True, "between 0 and 1"),
        ("document", "", "a name"),
        ("prefill", 7, "a name"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed_and_what_is_clear_is_kept(name, value, allowed):
    wishes = wishes_of({"cachetier": {"store": False, name: value}})
    assert wishes._replace(complaint="") == Wishes(store=False)
    assert name in wishes.complaint
    assert allowed in wishes.complaint


def test_something_else_than_an_object_is_complained_about():
    assert "not an object" in wishes_of({"cachetier": "off"}).complaint
