"""A real engine stores, loads or does both by the role that it is given while it serves."""

import json

import pytest

from cachetier.cli.main import main
from tests.connector.servers import eventually
from tests.e2e.harness import PATIENT, assert_same_answers
from tests.e2e.stand import NOISE, Stand, prompt_of, storable

pytestmark = pytest.mark.engine

NAME = "the-engine"


def become(stand: Stand, role: str) -> None:
    """Give the engine a role and wait until it knows."""
    assert main(["role", NAME, role, "--socket", str(stand.server.socket)]) == 0
    eventually(lambda: stand.engine.log.read_text().count("from now on") and _last_role(stand) == role)


def _last_role(stand: Stand) -> str:
    return stand.engine.log.read_text().rpartition(" and is a ")[2].split()[0]


def test_an_engine_does_what_the_role_that_it_is_given_says(tmp_path, capsys):
    first, second = prompt_of(500, 300), prompt_of(501, 260)
    stand = Stand(tmp_path, PATIENT | {"name": NAME}, kv_role="kv_consumer")
    try:
        assert main(["engines", "--json", "--socket", str(stand.server.socket)]) == 0
        [engine] = json.loads(capsys.readouterr().out)
        assert (engine["name"], engine["role"], engine["tensor_parallel"]) == (NAME, "consumer", 1)
        expected = stand.plain([first, second])

        before = stand.counts()
        stand.assert_no_hits([first])
        assert stand.counts() == before, "a consumer stores nothing"

        become(stand, "producer")
        assert_same_answers(stand.assert_no_hits([first]), expected[:1], NOISE)
        stand.wait_until_stored(before, storable(first))
        stand.assert_no_hits([first])

        become(stand, "consumer")
        assert_same_answers(stand.assert_hits([first]), expected[:1], NOISE)
        before = stand.counts()
        stand.assert_no_hits([second])
        assert stand.counts() == before

        become(stand, "both")
        stand.assert_no_hits([second])
        stand.wait_until_stored(before, storable(second))
        assert_same_answers(stand.assert_hits([second]), expected[1:], NOISE)
        stand.stop()
    finally:
        stand.kill()
