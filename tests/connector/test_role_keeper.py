"""The engine's word to the server about itself, and what the server answers; see also `test_scheduler_half`."""

import dataclasses

from cachetier.client import Client
from cachetier.core.engine_messages import ListEngines, SetRole
from cachetier_connector import role_keeper
from cachetier_connector.role_keeper import RoleKeeper
from tests.connector.blends import facts_of
from tests.connector.servers import TIMEOUT_S, connect, identity
from tests.service.running import RunningServer


def keeper_of(server, name, monkeypatch, **changes):
    """Return a keeper for which something is always due, and its link."""
    monkeypatch.setattr(role_keeper, "INTERVAL_S", 0.0)
    link = connect(server)
    return RoleKeeper(link, dataclasses.replace(facts_of(), **({"name": name} | changes)), identity(name)), link


def listing_of(server):
    return Client(server.socket_path).call(ListEngines(), TIMEOUT_S).engines


def engines_of(server):
    return [(engine.name, engine.role) for engine in listing_of(server)]


def test_where_the_engine_can_be_reached_is_listed(server, monkeypatch):
    config = facts_of(settings={"url": "http://here:8000"}).config
    keeper, link = keeper_of(server, "e", monkeypatch, config=config)
    keeper.tend()
    assert [engine.url for engine in listing_of(server)] == ["http://here:8000"]
    link.close()


def test_a_role_that_was_given_is_kept_when_the_server_is_replaced(tmp_path, monkeypatch):
    with RunningServer(tmp_path / "data") as server:
        keeper, link = keeper_of(server, "e", monkeypatch, role="producer")
        keeper.tend()
        assert (keeper.loads, keeper.stores) == (False, True)
        Client(server.socket_path).call(SetRole(name="e", role="consumer"), TIMEOUT_S)
        keeper.tend()
        assert (keeper.loads, keeper.stores) == (True, False)
    with RunningServer(tmp_path / "data") as server:
        keeper.tend()
        link.connect()
        keeper.tend()
        assert engines_of(server) == [("e", "consumer")]
        assert (keeper.loads, keeper.stores) == (True, False)
        link.close()


def test_who_finds_its_name_taken_says_so_once_and_serves_on(server, monkeypatch, caplog):
    (first, first_link), (second, second_link) = (keeper_of(server, "same", monkeypatch) for _ in range(2))
    for _ in range(3):
        first.tend()
        second.tend()
    assert [record.message for record in caplog.records if "set another name" in record.message]
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    assert second_link.is_up
    assert second.loads
    first_link.close()
    second_link.close()
