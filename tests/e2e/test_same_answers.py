"""A hit gives the plain engine's answer and the stored KV: from memory, from disk, after restarts and kills."""

import pytest

from tests.e2e.same_answers import assert_same_from_everywhere, plain_answers

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]


def test_answers_are_the_same_from_memory_from_disk_after_restarts_and_after_kills(tmp_path, tmp_path_factory):
    plain = plain_answers(tmp_path_factory.mktemp("plain") / "engine.log")
    assert_same_from_everywhere(tmp_path, plain)
